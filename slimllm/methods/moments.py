"""Moments of a sub-layer's output before and after pruning, from which recoveries derive slopes and intercepts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slimllm import ops
from slimllm.statistics import GramStatistics

PART = 1024  # columns of a covariance that are read at a time


@dataclass(frozen=True)
class OutputMeans:
    """Means of a sub-layer's dense output y and pruned output ŷ, each (D,) fp64. Without variances, errors are unknown."""

    mean_y: torch.Tensor
    mean_y_hat: torch.Tensor

    def relative_error(self, slope: torch.Tensor, intercept: torch.Tensor) -> float | None:
        """Return None: the error is unknown."""
        return None

    def error_of_removal(self) -> float | None:
        """Return the `relative_error` of the pruned output without a recovery."""
        return self.relative_error(torch.ones_like(self.mean_y), torch.zeros_like(self.mean_y))


@dataclass(frozen=True)
class OutputMoments(OutputMeans):
    """Moments of a sub-layer's dense output y and pruned output ŷ, each (D,) fp64, population (1/N) normalised."""

    variance_y: torch.Tensor
    variance_y_hat: torch.Tensor
    covariance: torch.Tensor

    def affine_fit(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return slope and intercept of the regression of y on ŷ, (D,) each; see `slimllm.ops.affine_fit`."""
        return ops.affine_fit(self.mean_y, self.mean_y_hat, self.variance_y_hat, self.covariance)

    def relative_error(self, slope: torch.Tensor, intercept: torch.Tensor) -> float:
        """Compute Σ_k E(y_k - a_k ŷ_k - b_k)² / Σ_k var(y_k): 0 is perfect, 1 is as good as the mean.

        Args:
            slope, intercept: a and b, (D,) fp64.
        """
        bias = self.mean_y - slope * self.mean_y_hat - intercept
        residual = self.variance_y - 2 * slope * self.covariance + slope.square() * self.variance_y_hat
        return relative_error(float((residual.clamp(min=0) + bias.square()).sum()), self.variance_y)


def relative_error(error: float, variance_y: torch.Tensor) -> float:
    """Divide an output error, summed over dimensions, by the sum of the output's variance (D,)."""
    total = float(variance_y.sum())
    return error / total if total > 0 else 0.0


def unit_moments(covariance: torch.Tensor, unit_means: torch.Tensor, keep: torch.Tensor) -> OutputMoments:
    """Compute moments of the output before and after pruning from the units' covariances.

    Args:
        covariance: C from `head_covariance`, (H, H, D).
        unit_means: Means of the units' contributions, (H, D).
        keep: Indices of the kept units.
    """
    keep = keep.to(covariance.device)
    with_full = covariance.sum(1)
    return OutputMoments(
        mean_y=unit_means.sum(0),
        mean_y_hat=unit_means[keep].sum(0),
        variance_y=with_full.sum(0),
        variance_y_hat=covariance[keep][:, keep].sum((0, 1)),
        covariance=with_full[keep].sum(0),
    )


def channel_moments(
    weight: torch.Tensor, statistics: GramStatistics, keep: torch.Tensor, output_covariance: torch.Tensor
) -> OutputMoments:
    """Compute moments of the output before and after pruning from the Gram of all columns.

    Args:
        weight: W of the output projection, (D, F).
        statistics: Statistics of its inputs, F features.
        keep: Indices of the kept columns, on any device.
        output_covariance: Cov(y), (D, D).
    """
    kept, removed = kept_and_removed(keep, statistics.mean())
    mean, weight = statistics.mean().to(statistics.solver), weight.to(statistics.solver)
    kept_weight, removed_weight = (weight[:, columns.to(weight.device)].double() for columns in (kept, removed))
    of_kept, with_removed = torch.zeros_like(kept_weight[:, 0]), torch.zeros_like(kept_weight[:, 0])
    for part, columns in zip(kept_weight.split(PART, 1), kept.split(PART)):
        of_kept += ((kept_weight @ statistics.block(columns, kept).T) * part).sum(1)
    for part, columns in zip(removed_weight.split(PART, 1), removed.split(PART)):
        with_removed += ((kept_weight @ statistics.block(columns, kept).T) * part).sum(1)
    kept, removed = kept.to(mean.device), removed.to(mean.device)
    moments = (kept_weight @ mean[kept] + removed_weight @ mean[removed], kept_weight @ mean[kept])
    mean_y, mean_y_hat, of_kept, covariance = (
        part.to(output_covariance.device) for part in (*moments, of_kept, of_kept + with_removed)
    )
    return OutputMoments(mean_y, mean_y_hat, output_covariance.diagonal(), of_kept, covariance)


def kept_and_removed(keep: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of the kept and of the removed columns, on the device of the mean (F,)."""
    removed = torch.ones(len(mean), dtype=torch.bool, device=mean.device).index_fill_(0, keep.to(mean.device), False)
    return (~removed).nonzero()[:, 0], removed.nonzero()[:, 0]
