"""Streaming Gram of activations, accurate where the mean is far larger than the spread."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch

from slimllm import ops
from slimllm.ops.dispatch import full_precision
from slimllm.statistics.checks import Accumulator, check_batch, check_mass, check_other, check_weight, weighted_mean

_ROWS = 256  # rows of a matrix that are copied at a time
TILE = 2048  # rows of a Gram that are moved between devices at a time


class GramStatistics(Accumulator):
    """Count, mean and (co)variance of a stream of token batches (num_tokens, features), weighted or not.

    The Gram is accumulated about a pivot p, the mean of the first batch, which should be typical. With u_t = x_t - p,

        gram = Σ_t w_t u_t u_tᵀ,  total = Σ_t w_t u_t,  Cov(x) = gram/m - δδᵀ,  δ = total/m,  mean = p + δ,

    with m = Σ_t w_t, the number of tokens if they have no weights.

    δ is of the order of the spread, not of the mean, so the subtraction loses nothing even at |mean| = 10⁴ σ, where the
    raw Gram in fp32 has lost every digit of the variance. A pivot makes products of half-precision activations three
    times as costly. For these, only features with |mean| > 4 σ get one; the raw Gram of the others has at most 17 σ² on
    its diagonal and loses a digit.

    The Gram is accumulated in fp32, the sums in fp64. Results are fp64.

    Args:
        features: Number of features F.
        device: Device of the accumulators; it may differ from that of the tokens.
        solver: Device on which large systems of these statistics are solved, and to which `rows` and `block` go; None: the
            same.
    """

    by_tiles = False  # whether no more than TILE rows of the Gram should be in use at a time

    def __init__(self, features: int, device: torch.device | str = "cpu", solver: torch.device | str | None = None) -> None:
        super().__init__(features)
        self.solver = torch.device(device if solver is None else solver)
        self.pivot = torch.zeros(features, dtype=torch.float32, device=device)
        self.gram = self._zeros(device)
        self.total = torch.zeros(features, dtype=torch.float64, device=device)
        self._plain = True  # the pivot is zero everywhere
        self._is_half = False  # only the lower half of the Gram is valid
        self._centred = True  # see `about_zero`

    def _zeros(self, device: torch.device | str) -> torch.Tensor:
        """Return memory for the Gram."""
        return torch.zeros(self.features, self.features, dtype=torch.float32, device=device)

    def _release(self) -> None:
        """Do what is to be done after some rows of the Gram have been used."""

    def update(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        """Add a batch.

        Args:
            x: (num_tokens, features), any floating dtype; num_tokens may be 0.
            weight: w, (num_tokens,), not negative; None: 1.
        """
        self._check_centred()
        x = check_batch(x, self.features)
        weight = check_weight(weight, x)
        if x.shape[0] == 0:
            return
        if self.count == 0:
            self.pivot = _pivot(x, weight).to(self.gram.device)
            self._plain = x.dtype != torch.float32 and not bool(self.pivot.any())
        if x.device == self.gram.device and not self.by_tiles:
            ops.gram_(self.gram, self.total, x, pivot=None if self._plain else self.pivot, weight=weight)
        else:
            self._add_tiles([(x, weight)])
        self._count(len(x), weight)

    def _add_tiles(self, batches: list[tuple[torch.Tensor, torch.Tensor | None]]) -> None:
        """Do the work of `ops.gram_` for some batches, in the lower half, TILE rows at a time; products on their device."""
        for start in range(0, self.features, TILE):
            stop = min(start + TILE, self.features)
            for x, weight in batches:
                u = x[:, :stop].float() if self._plain else x[:, :stop].float() - self.pivot[:stop].to(x.device)
                weighted = u if weight is None else u * weight[:, None]
                with full_precision(x.device):
                    self.gram[start:stop, :stop] += (u[:, start:].T @ weighted).to(self.gram.device)
                if stop == self.features:
                    self.total += weighted.sum(0, dtype=torch.float64).to(self.total.device)
            self._release()
        self._is_half = True

    def _complete(self) -> None:
        """Make the Gram whole: whatever reads it begins with this."""
        if self._is_half:
            for start in range(TILE, self.features, TILE):
                stop = min(start + TILE, self.features)
                self.gram[:start, start:stop] = self.gram[start:stop, :start].T
                self._release()
            self._is_half = False

    def merge(self, other: GramStatistics) -> None:
        """Add the statistics of another part of the stream, in place; the pivots may differ."""
        self._check_centred()
        check_other(self, other, self.features)
        if other.count == 0:
            return
        if self.count == 0:
            self.pivot, self._plain = other.pivot.to(self.gram.device, copy=True), other._plain
        self._complete()
        other._complete()
        total = other._total_about(self.pivot)
        for start in range(0, self.features, _ROWS):
            rows = slice(start, start + _ROWS)
            self.gram[rows] = self.gram[rows].double().add_(other._gram_about(self.pivot, rows)).float()
            self._release()
            other._release()
        self.total += total
        self._count_other(other)

    def move(self, pivot: torch.Tensor) -> None:
        """Shift the sums to another pivot, (features,) fp32, in place, so that other sums about it can be added."""
        self._check_centred()
        self._complete()
        total = self._total_about(pivot)
        for start in range(0, self.features, _ROWS):
            rows = slice(start, start + _ROWS)
            self.gram[rows] = self._gram_about(pivot, rows).float()
            self._release()
        self.total, self.pivot = total, pivot.to(self.pivot)
        self._plain = self._plain and not bool(pivot.any())

    def sums(self) -> Iterable[torch.Tensor]:
        """Return the tensors that add up between statistics about the same pivot."""
        self._complete()
        return [self.gram, self.total]

    def _total_about(self, pivot: torch.Tensor) -> torch.Tensor:
        """Return Σ_t w_t (x_t - pivot), on the pivot's device."""
        return self.total.to(pivot.device) + self.mass * (self.pivot.to(pivot).double() - pivot.double())

    def _gram_about(self, pivot: torch.Tensor, rows: slice) -> torch.Tensor:
        """Return rows of the Gram about another pivot, fp64, on its device: its u is our u plus a shift."""
        total, shift = self.total.to(pivot.device), self.pivot.to(pivot).double() - pivot.double()
        gram = self.gram[rows].to(pivot.device).double()
        return gram.addr_(total[rows], shift).addr_(shift[rows], total + self.mass * shift)

    def about_zero(self) -> GramStatistics:
        """Return a view with second moments E(x xᵀ) for covariances, as if the mean were 0; not to be updated.

        Regressions on it go through the origin.
        """
        self._complete()
        view = copy.copy(self)
        view._centred = False
        return view

    def _check_centred(self) -> None:
        if not self._centred:
            raise ValueError("statistics about zero are a view, which cannot be changed; change what it is a view of.")

    def mean(self) -> torch.Tensor:
        """Return the mean over tokens, (features,) fp64."""
        check_mass(self.mass)
        return self._true_mean() if self._centred else torch.zeros_like(self.total)

    def _true_mean(self) -> torch.Tensor:
        return self.pivot.double() + self.total / self.mass

    def _centre_(self, block: torch.Tensor, rows: slice | torch.Tensor, columns: slice | torch.Tensor) -> torch.Tensor:
        """Make a block of gram/m one of the covariance (or of the second moments), in place, on its device."""
        delta = (self.total / self.mass).to(block.device)
        block.addr_(delta[rows], delta[columns], alpha=-1)
        if not self._centred:
            mean = self._true_mean().to(block.device)
            block.addr_(mean[rows], mean[columns])
        return block

    def covariance(self) -> torch.Tensor:
        """Return the population covariance, (features, features) fp64, symmetric to the last bit."""
        check_mass(self.mass)
        self._complete()
        delta, mean = self.total / self.mass, None if self._centred else self._true_mean()
        covariance = torch.empty_like(self.gram, dtype=torch.float64)
        for start in range(0, self.features, _ROWS):  # avoids a second matrix of this size
            stop = min(start + _ROWS, self.features)
            rows = self.gram[start:stop, :stop].double().add_(self.gram[:stop, start:stop].T).div_(2 * self.mass)
            rows.sub_(delta[start:stop, None] * delta[:stop])
            if mean is not None:
                rows.add_(mean[start:stop, None] * mean[:stop])
            covariance[start:stop, :stop] = rows
            covariance[:stop, start:stop] = rows.T
            self._release()
        return covariance

    def variance(self) -> torch.Tensor:
        """Return the population variance, (features,) fp64."""
        check_mass(self.mass)
        self._complete()
        squares = torch.empty_like(self.total)
        for start in range(0, self.features, TILE):  # of a file, no more rows at a time
            squares[start : start + TILE] = self.gram[start : start + TILE, start : start + TILE].diagonal()
            self._release()
        variance = (squares / self.mass - (self.total / self.mass).square()).clamp_(min=0)
        return variance if self._centred else variance + self._true_mean().square()

    def norms(self) -> torch.Tensor:
        """Return (Σ_t w_t x_tj²)^½, which is ‖X[:,j]‖₂ without weights: (features,) fp64."""
        return (self.mass * (self.variance() + self.mean().square())).sqrt()

    def leading(self, features: int) -> GramStatistics:
        """Return the statistics of the first features alone, as views that change with these statistics."""
        self._complete()
        part = copy.copy(self)
        part.features = features
        part.pivot, part.total, part.gram = self.pivot[:features], self.total[:features], self.gram[:features, :features]
        return part

    def of_product(self, weight: torch.Tensor) -> torch.Tensor:
        """Return Cov(W x) = W Cov(x) Wᵀ for a weight (D, features): (D, D) fp64 on its device, computed in fp32."""
        check_mass(self.mass)
        self._complete()
        single = weight.float()
        at_once = self.features if weight.device == self.gram.device and not self.by_tiles else TILE
        raw = single.new_zeros(len(single), len(single))
        with full_precision(weight.device):
            for columns, rows in zip(single.split(at_once, 1), self.gram.split(at_once)):
                raw.addmm_(columns, rows.to(weight.device) @ single.T)
                self._release()
        covariance = raw.double().div_(self.mass)
        means = [(self.total / self.mass, -1.0)] + ([] if self._centred else [(self._true_mean(), 1.0)])
        for mean, sign in means:
            moved = torch.cat([rows.double() @ mean.to(weight.device) for rows in weight.split(_ROWS)])
            covariance.addr_(moved, moved, alpha=sign)
        return (covariance + covariance.T).div_(2)

    def rows(self, rows: slice) -> torch.Tensor:
        """Return some rows of the covariance without the rest, (len(rows), features) fp64, on the solver's device."""
        check_mass(self.mass)
        self._complete()
        covariance = self.gram[rows].to(self.solver).double()
        self._release()
        return self._centre_(covariance.div_(self.mass), rows, slice(None))

    def block(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Return rows and columns of the covariance without the rest, on the solver's device.

        Args:
            rows, columns: Indices, on the device of the Gram.

        Returns:
            The covariances, (len(rows), len(columns)) fp64.
        """
        check_mass(self.mass)
        self._complete()
        block = self.gram[rows[:, None], columns].to(self.solver).double()
        self._release()
        return self._centre_(block.div_(self.mass), rows.to(self.solver), columns.to(self.solver))


def _pivot(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Return the pivot of a stream, (features,) fp32, from its first batch."""
    if x.dtype == torch.float32:
        return weighted_mean(x, weight)
    single = x.float()
    mean = weighted_mean(single, weight)
    deviation = weighted_mean(single.sub_(mean).square_(), weight).sqrt()
    return torch.where(mean.abs() > 4 * deviation, mean.to(x.dtype).float(), 0.0)
