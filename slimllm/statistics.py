"""Streaming statistics of activations: constant memory, any split into batches, safe when the mean dwarfs the spread."""

from __future__ import annotations

import torch

from slimllm import ops
from slimllm.ops.dispatch import full_precision

_ROWS = 256  # of a matrix at a time, where a copy of it is made
TILE = 2048  # rows of a Gram at a time, where it goes from one device to another


class GramStatistics:
    """Count, mean and (co)variance of a stream of token batches (num_tokens, features).

    The Gram is accumulated about a pivot p, the mean of the first batch, which should be a typical one: with u_t = x_t - p,

        gram = Σ_t u_t u_tᵀ,  total = Σ_t u_t,  Cov(x) = gram/N - δδᵀ,  δ = total/N,  mean = p + δ.

    δ is then of the order of the spread and not of the mean, so the subtraction loses nothing even when
    |mean| = 10⁴ σ, where the raw Gram in fp32 has lost every digit of the variance. A pivot makes products of
    half-precision activations three times as costly, so there only features of |mean| > 4 σ get one: the raw Gram of
    the others has 17 σ² at most on its diagonal, and loses a digit.

    Args:
        features: Number of features F.
        device: Where the accumulators live, which need not be where the tokens are.

    The Gram is accumulated in fp32, the sums in fp64. Results are fp64.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        if features < 1:
            raise ValueError(f"features must be at least 1, got {features}.")
        self.features = features
        self.count = 0
        self.pivot = torch.zeros(features, dtype=torch.float32, device=device)
        self.gram = torch.zeros(features, features, dtype=torch.float32, device=device)
        self.total = torch.zeros(features, dtype=torch.float64, device=device)
        self._plain = True  # the pivot is zero everywhere

    def update(self, x: torch.Tensor) -> None:
        """Add a batch.

        Args:
            x: (num_tokens, features), any floating dtype; num_tokens may be 0.
        """
        x = _check_batch(x, self.features)
        if x.shape[0] == 0:
            return
        if self.count == 0:
            self.pivot = _pivot(x).to(self.gram.device)
            self._plain = x.dtype != torch.float32 and not bool(self.pivot.any())
        if x.device == self.gram.device:
            ops.gram_(self.gram, self.total, x, pivot=None if self._plain else self.pivot)
        else:
            self._add_tiles(x)
        self.count += x.shape[0]

    def _add_tiles(self, x: torch.Tensor) -> None:
        """What `ops.gram_` does, where the activations are on another device: made there row by row, and added here."""
        u = x.float() if self._plain else x.float() - self.pivot.to(x.device)
        with full_precision(x.device):
            for start in range(0, self.features, TILE):
                stop = min(start + TILE, self.features)
                self.gram[start:stop, :stop] += (u[:, start:stop].T @ u[:, :stop]).to(self.gram.device)
                self.gram[:start, start:stop] = self.gram[start:stop, :start].T
        self.total += u.sum(0, dtype=torch.float64).to(self.total.device)

    def merge(self, other: GramStatistics) -> None:
        """Add the statistics of another part of the stream, in place; the pivots may differ."""
        _check_other(self, other, self.features)
        if other.count == 0:
            return
        if self.count == 0:
            self.pivot, self._plain = other.pivot.to(self.gram.device, copy=True), other._plain
        total = other._total_about(self.pivot)
        for start in range(0, self.features, _ROWS):
            rows = slice(start, start + _ROWS)
            self.gram[rows] = self.gram[rows].double().add_(other._gram_about(self.pivot, rows)).float()
        self.total += total
        self.count += other.count

    def move(self, pivot: torch.Tensor) -> None:
        """Let the sums be about another pivot, (features,) fp32, in place, so that others about it can be added."""
        total = self._total_about(pivot)
        for start in range(0, self.features, _ROWS):
            rows = slice(start, start + _ROWS)
            self.gram[rows] = self._gram_about(pivot, rows).float()
        self.total, self.pivot = total, pivot.to(self.pivot)
        self._plain = self._plain and not bool(pivot.any())

    def sums(self) -> list[torch.Tensor]:
        """What adds up between statistics about the same pivot."""
        return [self.gram, self.total]

    def _total_about(self, pivot: torch.Tensor) -> torch.Tensor:
        """Σ_t (x_t - pivot), on the pivot's device."""
        return self.total.to(pivot.device) + self.count * (self.pivot.to(pivot).double() - pivot.double())

    def _gram_about(self, pivot: torch.Tensor, rows: slice) -> torch.Tensor:
        """Some rows of the Gram about a pivot, fp64, on its device: u about it is u about ours plus the shift."""
        total, shift = self.total.to(pivot.device), self.pivot.to(pivot).double() - pivot.double()
        gram = self.gram[rows].to(pivot.device).double()
        return gram.addr_(total[rows], shift).addr_(shift[rows], total + self.count * shift)

    def mean(self) -> torch.Tensor:
        """Mean over tokens: (features,) fp64."""
        _check_count(self.count)
        return self.pivot.double() + self.total / self.count

    def covariance(self) -> torch.Tensor:
        """Population covariance: (features, features) fp64, symmetric to the last bit."""
        _check_count(self.count)
        delta = self.total / self.count
        covariance = torch.empty_like(self.gram, dtype=torch.float64)
        for start in range(0, self.features, _ROWS):  # no second matrix of its size
            stop = min(start + _ROWS, self.features)
            rows = self.gram[start:stop, :stop].double().add_(self.gram[:stop, start:stop].T).div_(2 * self.count)
            rows.sub_(delta[start:stop, None] * delta[:stop])
            covariance[start:stop, :stop] = rows
            covariance[:stop, start:stop] = rows.T
        return covariance

    def norms(self) -> torch.Tensor:
        """‖X[:,j]‖₂ over all tokens: (features,) fp64."""
        _check_count(self.count)
        delta = self.total / self.count
        variance = (self.gram.diagonal().double() / self.count - delta.square()).clamp_(min=0)
        return (self.count * (variance + self.mean().square())).sqrt()

    def of_product(self, weight: torch.Tensor) -> torch.Tensor:
        """Cov(W x) = W Cov(x) Wᵀ for a weight (D, features): (D, D) fp64 on its device, computed in fp32."""
        _check_count(self.count)
        single, delta = weight.float(), (self.total / self.count).to(weight.device)
        moved = torch.cat([rows.double() @ delta for rows in weight.split(_ROWS)])
        at_once = self.features if weight.device == self.gram.device else TILE
        raw = single.new_zeros(len(single), len(single))
        with full_precision(weight.device):
            for columns, rows in zip(single.split(at_once, 1), self.gram.split(at_once)):
                raw.addmm_(columns, rows.to(weight.device) @ single.T)
        covariance = raw.double().div_(self.count).addr_(moved, moved, alpha=-1)
        return (covariance + covariance.T).div_(2)

    def block(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Some rows and columns of the covariance, by index: (len(rows), len(columns)) fp64, without the whole of it."""
        _check_count(self.count)
        delta = self.total / self.count
        block = self.gram[rows[:, None], columns].double().div_(self.count)
        return block.addr_(delta[rows], delta[columns], alpha=-1)


def _check_batch(x: torch.Tensor, features: int, name: str = "x") -> torch.Tensor:
    """The batch without its autograd graph, in fp32 where it is in no half precision."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {x.dtype if isinstance(x, torch.Tensor) else type(x)}.")
    if x.ndim != 2 or x.shape[1] != features:
        raise ValueError(f"{name} must have shape (num_tokens, {features}), got {tuple(x.shape)}.")
    return x.detach() if x.dtype in (torch.bfloat16, torch.float16) else x.detach().float()


def _check_other(ours: object, other: object, features: int) -> None:
    if type(other) is not type(ours):
        raise TypeError(f"only another {type(ours).__name__} can be merged, got {type(other).__name__}.")
    if other.features != features:  # type: ignore[attr-defined]
        raise ValueError(f"cannot merge statistics of {other.features} features into {features}.")  # type: ignore[attr-defined]


def _check_count(count: int) -> None:
    if count == 0:
        raise ValueError("no tokens have been added yet; call update() first.")


def _pivot(x: torch.Tensor) -> torch.Tensor:
    """The pivot of a stream, (features,) fp32, from its first batch."""
    if x.dtype == torch.float32:
        return x.mean(0)
    deviation, mean = torch.std_mean(x.float(), dim=0, correction=0)
    return torch.where(mean.abs() > 4 * deviation, mean.to(x.dtype).float(), 0.0)


class ColumnStatistics:
    """Mean, variance and Euclidean norm over tokens of every feature of a stream, in O(F) memory.

    As in `GramStatistics` sums are about a pivot p, the mean of the first batch, so that the variance keeps its digits
    where the mean is far larger than the spread. Sums of a batch are fp32, over batches fp64. Results are fp64.

    Args:
        features: Number of features F.
        device: Where the accumulators live.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        if features < 1:
            raise ValueError(f"features must be at least 1, got {features}.")
        self.features = features
        self.count = 0
        self.pivot = torch.zeros(features, dtype=torch.float32, device=device)
        self.total = torch.zeros(features, dtype=torch.float64, device=device)
        self.squares = torch.zeros(features, dtype=torch.float64, device=device)

    def update(self, x: torch.Tensor) -> None:
        """Add a batch x (num_tokens, features), any floating dtype."""
        x = _check_batch(x, self.features)
        if x.shape[0] == 0:
            return
        if self.count == 0:
            self.pivot = x.mean(0, dtype=torch.float32)
        ops.column_sums_(self.total, self.squares, x, pivot=self.pivot)
        self.count += x.shape[0]

    def merge(self, other: ColumnStatistics) -> None:
        """Add the statistics of another part of the stream, in place; the pivots may differ."""
        _check_other(self, other, self.features)
        if self.count == 0:
            self.pivot = other.pivot.to(self.total.device, copy=True)
        total, squares = other._about(self.pivot)
        self.squares += squares
        self.total += total
        self.count += other.count

    def move(self, pivot: torch.Tensor) -> None:
        """Let the sums be about another pivot, (features,) fp32, in place, so that others about it can be added."""
        self.total, self.squares = self._about(pivot)
        self.pivot = pivot.to(self.pivot)

    def sums(self) -> list[torch.Tensor]:
        """What adds up between statistics about the same pivot."""
        return [self.total, self.squares]

    def _about(self, pivot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Σ_t (x_t - pivot) and Σ_t (x_t - pivot)², on the pivot's device."""
        total, shift = self.total.to(pivot.device), self.pivot.to(pivot).double() - pivot.double()
        squares = self.squares.to(pivot.device) + 2 * shift * total + self.count * shift.square()
        return total + self.count * shift, squares

    def mean(self) -> torch.Tensor:
        """Mean over tokens: (features,) fp64."""
        _check_count(self.count)
        return self.pivot.double() + self.total / self.count

    def variance(self) -> torch.Tensor:
        """Population variance: (features,) fp64."""
        _check_count(self.count)
        return (self.squares / self.count - (self.total / self.count).square()).clamp_(min=0)

    def norms(self) -> torch.Tensor:
        """‖X[:,j]‖₂ over all tokens: (features,) fp64."""
        return (self.count * (self.variance() + self.mean().square())).sqrt()


class PairedMoments:
    """Variance of ŷ and covariance of y with ŷ, dimension by dimension, about means known beforehand.

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
        self.features = len(mean_y)
        self.count = 0
        self.squares = torch.zeros_like(mean_y)
        self.products = torch.zeros_like(mean_y)

    def update(self, y: torch.Tensor, y_hat: torch.Tensor) -> None:
        """Add a batch: y and ŷ of the same tokens, both (num_tokens, features)."""
        y, y_hat = _check_batch(y, self.features, "y"), _check_batch(y_hat, self.features, "y_hat")
        ops.column_products_(self.squares, self.products, y, y_hat, pivot_y=self._center_y, pivot_y_hat=self._center_y_hat)
        self.count += y.shape[0]

    def merge(self, other: PairedMoments) -> None:
        """Add the moments of another part of the stream, about the same means, in place."""
        _check_other(self, other, self.features)
        self.squares += other.squares.to(self.squares.device)
        self.products += other.products.to(self.products.device)
        self.count += other.count

    def sums(self) -> list[torch.Tensor]:
        """What adds up between moments about the same means."""
        return [self.squares, self.products]

    def variance(self) -> torch.Tensor:
        """var(ŷ_k): (features,) fp64."""
        _check_count(self.count)
        return self.squares / self.count

    def covariance(self) -> torch.Tensor:
        """cov(y_k, ŷ_k): (features,) fp64."""
        _check_count(self.count)
        return self.products / self.count
