"""Per-feature streaming sums, from which norms and the affine regression follow without a Gram."""

from __future__ import annotations

import torch

from slimllm import ops
from slimllm.statistics.checks import Accumulator, check_batch, check_mass, check_other, check_weight, weighted_mean


class ColumnStatistics(Accumulator):
    """Per-feature mean, variance and Euclidean norm over the tokens of a stream, weighted or not, in O(F) memory.

    As in `GramStatistics`, sums are about a pivot p, the mean of the first batch, so that the variance keeps its digits
    where the mean is far larger than the spread. Sums within a batch are fp32, sums over batches and results fp64.

    Args:
        features: Number of features F.
        device: Device of the accumulators.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(features)
        self.pivot = torch.zeros(features, dtype=torch.float32, device=device)
        self.total = torch.zeros(features, dtype=torch.float64, device=device)
        self.squares = torch.zeros(features, dtype=torch.float64, device=device)

    def update(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        """Add a batch x (num_tokens, features), any floating dtype; weights w (num_tokens,), not negative; None: 1."""
        x = check_batch(x, self.features)
        weight = check_weight(weight, x)
        if x.shape[0] == 0:
            return
        if self.count == 0:
            self.pivot = weighted_mean(x, weight)
        ops.column_sums_(self.total, self.squares, x, pivot=self.pivot, weight=weight)
        self._count(len(x), weight)

    def merge(self, other: ColumnStatistics) -> None:
        """Add the statistics of another part of the stream, in place; the pivots may differ."""
        check_other(self, other, self.features)
        if self.count == 0:
            self.pivot = other.pivot.to(self.total.device, copy=True)
        total, squares = other._about(self.pivot)
        self.squares += squares
        self.total += total
        self._count_other(other)

    def move(self, pivot: torch.Tensor) -> None:
        """Shift the sums to another pivot, (features,) fp32, in place, so that other sums about it can be added."""
        self.total, self.squares = self._about(pivot)
        self.pivot = pivot.to(self.pivot)

    def sums(self) -> list[torch.Tensor]:
        """Return the tensors that add up between statistics about the same pivot."""
        return [self.total, self.squares]

    def _about(self, pivot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return Σ_t w_t (x_t - pivot) and Σ_t w_t (x_t - pivot)², on the pivot's device."""
        total, shift = self.total.to(pivot.device), self.pivot.to(pivot).double() - pivot.double()
        squares = self.squares.to(pivot.device) + 2 * shift * total + self.mass * shift.square()
        return total + self.mass * shift, squares

    def mean(self) -> torch.Tensor:
        """Return the mean over tokens, (features,) fp64."""
        check_mass(self.mass)
        return self.pivot.double() + self.total / self.mass

    def variance(self) -> torch.Tensor:
        """Return the population variance, (features,) fp64."""
        check_mass(self.mass)
        return (self.squares / self.mass - (self.total / self.mass).square()).clamp_(min=0)

    def norms(self) -> torch.Tensor:
        """Return (Σ_t w_t x_tj²)^½, which is ‖X[:,j]‖₂ without weights: (features,) fp64."""
        return (self.mass * (self.variance() + self.mean().square())).sqrt()


class PairedMoments(Accumulator):
    """Per-dimension variance of ŷ and covariance of y with ŷ, about given means.

    Args:
        mean_y: (features,) fp64, mean of y over all tokens of the stream.
        mean_y_hat: (features,) fp64, mean of ŷ over all tokens of the stream.
    """

    def __init__(self, mean_y: torch.Tensor, mean_y_hat: torch.Tensor) -> None:
        self.mean_y, self.mean_y_hat = mean_y, mean_y_hat
        if mean_y.ndim != 1 or mean_y.shape != mean_y_hat.shape:
            raise ValueError(
                f"mean_y and mean_y_hat must be (features,), got {tuple(mean_y.shape)} and {tuple(mean_y_hat.shape)}."
            )
        self._center_y, self._center_y_hat = mean_y.float(), mean_y_hat.float()
        super().__init__(len(mean_y))
        self.squares = torch.zeros_like(mean_y)
        self.products = torch.zeros_like(mean_y)

    def update(self, y: torch.Tensor, y_hat: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        """Add a batch: y and ŷ of the same tokens, both (num_tokens, features); weights w (num_tokens,); None: 1."""
        y, y_hat = check_batch(y, self.features, "y"), check_batch(y_hat, self.features, "y_hat")
        weight = check_weight(weight, y)
        centers = {"pivot_y": self._center_y, "pivot_y_hat": self._center_y_hat}
        ops.column_products_(self.squares, self.products, y, y_hat, **centers, weight=weight)
        self._count(len(y), weight)

    def merge(self, other: PairedMoments) -> None:
        """Add the moments of another part of the stream, about the same means, in place."""
        check_other(self, other, self.features)
        self.squares += other.squares.to(self.squares.device)
        self.products += other.products.to(self.products.device)
        self._count_other(other)

    def sums(self) -> list[torch.Tensor]:
        """Return the tensors that add up between moments about the same means."""
        return [self.squares, self.products]

    def variance(self) -> torch.Tensor:
        """Return var(ŷ_k), (features,) fp64."""
        check_mass(self.mass)
        return self.squares / self.mass

    def covariance(self) -> torch.Tensor:
        """Return cov(y_k, ŷ_k), (features,) fp64."""
        check_mass(self.mass)
        return self.products / self.mass
