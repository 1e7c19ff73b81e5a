"""Least squares: a ridge regression on the kept columns refits all of their weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slimllm import ops
from slimllm.methods.moments import kept_and_removed, relative_error
from slimllm.methods.recovery.base import Fit, Recovery, register_recovery
from slimllm.methods.ridge import column_scale, has_few_tokens
from slimllm.methods.statistics import Needs, SublayerStatistics
from slimllm.models.slicing import OutputChange
from slimllm.models.sublayer import Sublayer
from slimllm.runtime.distributed import Ranks
from slimllm.statistics import GramStatistics

# λ for columns scaled to unit size, and λ for few tokens (benchmarks/NOTES.md).
RIDGE, RIDGE_OF_FEW = 0.3, 1.0


@register_recovery("lstsq")
class LeastSquares(Recovery):
    """Ridge regression of all kept weights of an output projection, for a result closer to the dense model."""

    needs = Needs.COLUMN_GRAM
    shares_work = True

    def fit(self, sublayer: Sublayer, statistics: SublayerStatistics, kept: torch.Tensor) -> Fit:
        weight = sublayer.output_projection.weight
        refit = refit_kept(weight, statistics.gram, sublayer.columns_of(kept), statistics.ranks)
        variance = statistics.output_variance()
        return Fit(refit.change, relative_error(refit.before, variance), relative_error(refit.after, variance))


@dataclass(frozen=True)
class Refit:
    """A change of the kept columns' weights, and the output error Σ_k E(e_k)² before and after it."""

    change: OutputChange
    before: float
    after: float


def refit_kept(weight: torch.Tensor, statistics: GramStatistics, keep: torch.Tensor, ranks: Ranks | None = None) -> Refit:
    """Fit the output of the removed columns by the kept ones (`least_squares`), from the Gram of all columns.

    With R the removed columns and S the kept ones, e = W_R z_R:

        Cov(z_S, e) = Ĝ_SR W_Rᵀ,   E e = W_R E z_R,   var(e_k) = (W_R Ĝ_RR W_Rᵀ)_kk.

    Args:
        weight: W of the output projection, (D, F).
        statistics: Statistics of its inputs z, F features; everything is computed on their device.
        keep: Indices of the kept columns, on any device.
        ranks: Processes with the same statistics, each of which computes its share of the outputs; None: this process only.
    """
    ranks = ranks or Ranks()
    outputs, mean = len(weight), statistics.mean()
    weight = ranks.rows(weight).to(mean.device)
    kept, removed = kept_and_removed(keep, mean)
    removed_weight = weight[:, removed].double()
    lost = ((removed_weight @ statistics.block(removed, removed)) * removed_weight).sum(1)
    across = statistics.block(kept, removed) @ removed_weight.T
    mean_lost = removed_weight @ mean[removed]
    ridge = RIDGE_OF_FEW if has_few_tokens(statistics) else RIDGE
    change, missing = least_squares(statistics.block(kept, kept), across, lost, mean[kept], mean_lost, ridge)
    assert change.delta is not None and change.intercept is not None
    whole = OutputChange(ranks.join(change.intercept, outputs), delta=ranks.join(change.delta, outputs))
    errors = torch.stack([lost.sum() + mean_lost.square().sum(), missing])
    ranks.sum_(errors)
    before, after = errors.clamp(min=0).tolist()
    return Refit(whole, before, after)


def least_squares(
    covariance: torch.Tensor,
    cross: torch.Tensor,
    lost: torch.Tensor,
    mean: torch.Tensor,
    mean_lost: torch.Tensor,
    ridge: float = RIDGE,
) -> tuple[OutputChange, torch.Tensor]:
    """Compute the change of the kept columns' weights that best makes up for the removed columns.

    With e = y - ŷ the output that pruning removed, a ridge regression of e on the kept inputs z,

        Δᵀ = D⁻¹ (D⁻¹ Cov(z) D⁻¹ + λI)⁻¹ D⁻¹ Cov(z, e),   D² = diag Cov(z) + 0.01 (E z)²,   b = E e - Δ E z,

    shrinks the new weights towards the old ones, relative to the size of each column. Few tokens, even fewer than columns,
    therefore do no harm.

    Args:
        covariance: Cov(z), (|S|, |S|) fp64; overwritten.
        cross: Cov(z, e), (|S|, D) fp64; overwritten.
        lost: var(e_k), (D,) fp64.
        mean: E z, (|S|,) fp64.
        mean_lost: E e, (D,) fp64.
        ridge: λ.

    Returns:
        The change, and the error that remains, Σ_k var(e_k - Δ_k z), up to rounding.
    """
    scale = column_scale(covariance.diagonal(), mean)
    inverse = torch.where(scale > 0, scale.reciprocal(), 0.0)
    correlation = covariance.mul_(inverse[:, None]).mul_(inverse)
    across = cross.mul_(inverse[:, None])
    scaled = ops.lstsq(correlation[None], across[None], ridge, absolute=True)[0]
    delta = inverse[:, None] * scaled
    # As (correlation + λI) scaled = across, tr(Δ Cov(z) Δᵀ) is tr(scaledᵀ across) - λ‖scaled‖².
    missing = lost.sum() - (scaled * across).sum() - ridge * scaled.square().sum()
    return OutputChange(mean_lost - delta.T @ mean, delta=delta.T), missing
