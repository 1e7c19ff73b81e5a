"""Regression of a sub-layer's dense output on what is left of it, as a change of the output projection.

`affine` is the paper's (SlimLLM, section "linear regression"): one slope and intercept for every output. `lstsq` fits all
weights of the kept columns anew. `bias` is FLAP's: the intercept alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slimllm import ops
from slimllm.models.slicing import OutputChange
from slimllm.runtime.distributed import Ranks
from slimllm.statistics import GramStatistics

# Ridge of `lstsq`, on columns scaled to unit size, and where there are few tokens (benchmarks/NOTES.md); and the part of a
# column's squared mean that counts as its size beside the variance, so that a column that is nearly constant gets no
# weights so large that rounding them moves the output.
RIDGE, RIDGE_OF_FEW = 0.3, 1.0
MEAN_PART = 0.01
_ROWS = 256  # of a weight in fp64 at a time


def has_few_tokens(statistics: GramStatistics) -> bool:
    """Whether there are fewer than two tokens for a column, so that a fit of all columns describes these tokens alone."""
    return statistics.count < 2 * statistics.features


@dataclass(frozen=True)
class OutputMoments:
    """Moments of a sub-layer's dense output y and pruned output ŷ, each (D,) fp64, population (1/N) normalised."""

    mean_y: torch.Tensor
    mean_y_hat: torch.Tensor
    variance_y: torch.Tensor
    variance_y_hat: torch.Tensor
    covariance: torch.Tensor

    def affine_fit(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Slope and intercept of the regression of y on ŷ, see `slimllm.ops.affine_fit`."""
        return ops.affine_fit(self.mean_y, self.mean_y_hat, self.variance_y_hat, self.covariance)

    def fit(self, recovery: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Slope and intercept of a recovery that is not `lstsq`."""
        if recovery == "affine":
            return self.affine_fit()
        slope = torch.ones_like(self.mean_y)
        return slope, self.mean_y - self.mean_y_hat if recovery == "bias" else torch.zeros_like(slope)

    def relative_error(self, slope: torch.Tensor, intercept: torch.Tensor) -> float:
        """Σ_k E(y_k - a_k ŷ_k - b_k)² / Σ_k var(y_k): 0 is perfect, 1 is as good as the mean."""
        bias = self.mean_y - slope * self.mean_y_hat - intercept
        residual = self.variance_y - 2 * slope * self.covariance + slope.square() * self.variance_y_hat
        return relative(float((residual.clamp(min=0) + bias.square()).sum()), self.variance_y)


def relative(error: float, variance_y: torch.Tensor) -> float:
    """An output error, summed over dimensions, relative to the output's variance (D,)."""
    total = float(variance_y.sum())
    return error / total if total > 0 else 0.0


def head_moments(covariance: torch.Tensor, head_means: torch.Tensor, keep: torch.Tensor) -> OutputMoments:
    """Moments of the attention output before and after pruning, from the heads' covariances.

    Args:
        covariance: C from `head_covariance`, (H, H, D).
        head_means: Means of the heads' contributions, (H, D).
        keep: Indices of the kept heads.
    """
    keep = keep.to(covariance.device)
    with_full = covariance.sum(1)
    return OutputMoments(
        mean_y=head_means.sum(0),
        mean_y_hat=head_means[keep].sum(0),
        variance_y=with_full.sum(0),
        variance_y_hat=covariance[keep][:, keep].sum((0, 1)),
        covariance=with_full[keep].sum(0),
    )


def mean_output(weight: torch.Tensor, mean: torch.Tensor, num_heads: int = 1) -> torch.Tensor:
    """E W_i x_i of every head's columns: (num_heads, D) fp64, without a copy of the weight in fp64.

    Args:
        weight: W, (D, num_heads · d), any floating dtype.
        mean: E x, (num_heads · d,) fp64.
    """
    by_head = mean.view(num_heads, -1)
    rows = [
        (some.double().view(len(some), num_heads, -1) * by_head).sum(-1) for some in weight.split(_ROWS)
    ]  # fmt: skip
    return torch.cat(rows).T


@dataclass(frozen=True)
class Refit:
    """The change of the kept columns' weights, and the output error Σ_k E(e_k)² before it and after it."""

    change: OutputChange
    before: float
    after: float


def refit_kept(
    weight: torch.Tensor, statistics: GramStatistics, keep: torch.Tensor, ranks: Ranks | None = None, share: float = 0.0
) -> Refit:
    """`least_squares` of what the removed columns put out on the kept ones, from the Gram of all of them.

    With R the removed columns and S the kept ones, e = Σ_R W_r z_r + λ a, where a is by how much the dense model's stream
    is ahead of the pruned one's:

        Cov(z_S, e) = Ĝ_SR W_Rᵀ + λ Cov(z_S, a),  E e = W_R E z_R + λ E a,
        var(e_k) = (W_R Ĝ_RR W_Rᵀ)_kk + 2λ (W_R Cov(z_R, a))_kk + λ² var(a_k).

    Args:
        weight: W of the output projection, (D, F).
        statistics: Of its inputs z, F features, and of a, D features more, if `share` is not 0; all is computed there.
        keep: Indices of the kept columns, on any device.
        ranks: Processes with the same statistics, each of which does its share of the outputs; None: this one alone.
        share: λ, how much of the way to the dense model's stream the fit aims for.
    """
    ranks = ranks or Ranks()
    (outputs, features), mean = weight.shape, statistics.mean()
    weight = ranks.rows(weight).to(mean.device)
    kept, removed = _kept_and_removed(keep, mean[:features])
    removed_weight = weight[:, removed].double()
    lost = ((removed_weight @ statistics.block(removed, removed)) * removed_weight).sum(1)
    across = statistics.block(kept, removed) @ removed_weight.T
    mean_lost = removed_weight @ mean[removed]
    if share:
        ahead = ranks.rows(torch.arange(features, features + outputs, device=mean.device))
        lost += 2 * share * (removed_weight * statistics.block(ahead, removed)).sum(1)
        lost += share**2 * statistics.variance()[ahead]
        across += share * statistics.block(kept, ahead)
        mean_lost += share * mean[ahead]
    ridge = RIDGE_OF_FEW if has_few_tokens(statistics) else RIDGE
    change, missing = least_squares(statistics.block(kept, kept), across, lost, mean[kept], mean_lost, ridge)
    assert change.delta is not None
    whole = OutputChange(ranks.join(change.intercept, outputs), delta=ranks.join(change.delta, outputs))
    errors = torch.stack([lost.sum() + mean_lost.square().sum(), missing])
    ranks.sum_(errors)
    before, after = errors.clamp(min=0).tolist()
    return Refit(whole, before, after)


def channel_moments(
    weight: torch.Tensor, statistics: GramStatistics, keep: torch.Tensor, output_covariance: torch.Tensor
) -> OutputMoments:
    """Moments of the output before and after pruning, from the Gram of all columns.

    Args:
        weight: W of the output projection, (D, F).
        statistics: Of its inputs, F features.
        keep: Indices of the kept columns, on any device.
        output_covariance: Cov(y), (D, D).
    """
    mean = statistics.mean()
    kept, removed = _kept_and_removed(keep, mean)
    weight = weight.to(mean.device)
    kept_weight, removed_weight = weight[:, kept].double(), weight[:, removed].double()
    of_kept = ((kept_weight @ statistics.block(kept, kept)) * kept_weight).sum(1)
    with_removed = ((kept_weight @ statistics.block(kept, removed)) * removed_weight).sum(1)
    moments = (kept_weight @ mean[kept] + removed_weight @ mean[removed], kept_weight @ mean[kept])
    mean_y, mean_y_hat, of_kept, covariance = (
        part.to(output_covariance.device) for part in (*moments, of_kept, of_kept + with_removed)
    )
    return OutputMoments(mean_y, mean_y_hat, output_covariance.diagonal(), of_kept, covariance)


def _kept_and_removed(keep: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    removed = torch.ones(len(mean), dtype=torch.bool, device=mean.device).index_fill_(0, keep.to(mean.device), False)
    return (~removed).nonzero()[:, 0], removed.nonzero()[:, 0]


def column_scale(variance: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """The size d of every column for the ridge: d² = var z + 0.01 (E z)², and 0 where it is constant. (F,) fp64."""
    variance = variance.clamp(min=0)
    return torch.where(variance > 0, (variance + MEAN_PART * mean.square()).sqrt(), 0.0)


def least_squares(
    covariance: torch.Tensor, cross: torch.Tensor, lost: torch.Tensor, mean: torch.Tensor, mean_lost: torch.Tensor,
    ridge: float = RIDGE,
) -> tuple[OutputChange, torch.Tensor]:  # fmt: skip
    """The change of the kept columns' weights by which they best stand in for what was removed.

    With e = y - ŷ the output that pruning took away, a ridge regression of e on the kept inputs z,

        Δᵀ = D⁻¹ (D⁻¹ Cov(z) D⁻¹ + λI)⁻¹ D⁻¹ Cov(z, e),   D² = diag Cov(z) + 0.01 (E z)²,   b = E e - Δ E z,

    shrinks the new weights towards the old ones, by as much as is right for a column's own size: few tokens and more
    columns than tokens do no harm.

    Args:
        covariance: Cov(z), (|S|, |S|) fp64; overwritten.
        cross: Cov(z, e), (|S|, D) fp64.
        lost: var(e_k), (D,) fp64.
        mean: E z, (|S|,) fp64.
        mean_lost: E e, (D,) fp64.
        ridge: λ.

    Returns:
        The change, and Σ_k var(e_k - Δ_k z), what is then still missing, up to rounding.
    """
    scale = column_scale(covariance.diagonal(), mean)
    inverse = torch.where(scale > 0, scale.reciprocal(), 0.0)
    correlation = covariance.mul_(inverse[:, None]).mul_(inverse)
    across = inverse[:, None] * cross
    scaled = ops.lstsq(correlation[None], across[None], ridge, absolute=True)[0]
    delta = inverse[:, None] * scaled
    # As (correlation + λI) scaled = across, tr(Δ Cov(z) Δᵀ) is tr(scaledᵀ across) - λ‖scaled‖².
    missing = lost.sum() - (scaled * across).sum() - ridge * scaled.square().sum()
    return OutputChange(mean_lost - delta.T @ mean, delta=delta.T), missing
