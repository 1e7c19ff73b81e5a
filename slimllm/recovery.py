"""Linear regression of the dense output on the pruned one (SlimLLM, section "linear regression"), folded into weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class OutputMoments:
    """Moments of a sub-layer's dense output y and pruned output ŷ, each (D,) fp64, population (1/N) normalised."""

    mean_y: torch.Tensor
    mean_y_hat: torch.Tensor
    variance_y: torch.Tensor
    variance_y_hat: torch.Tensor
    covariance: torch.Tensor

    def relative_error(self, slope: torch.Tensor, intercept: torch.Tensor) -> float:
        """Σ_k E(y_k - a_k ŷ_k - b_k)² / Σ_k var(y_k): 0 is perfect, 1 is as good as the mean."""
        bias = self.mean_y - slope * self.mean_y_hat - intercept
        residual = self.variance_y - 2 * slope * self.covariance + slope.square() * self.variance_y_hat
        total = self.variance_y.sum()
        return float((residual.clamp(min=0) + bias.square()).sum() / total) if total > 0 else 0.0


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


def affine_fit(moments: OutputMoments) -> tuple[torch.Tensor, torch.Tensor]:
    """(a_k, b_k) = argmin E(y_k - a_k ŷ_k - b_k)², one regression for every output dimension.

    a_k = cov(y_k, ŷ_k) / var(ŷ_k), b_k = mean(y_k) - a_k mean(ŷ_k). Where ŷ_k is constant, up to rounding, the slope
    is not determined and stays 1.

    Returns:
        slope and intercept, both (D,) fp64.
    """
    # fp32 activations carry relative errors near 1e-7 of |ŷ|, hence variances below (1e-7)²·E[ŷ²] are noise.
    noise = 1e-14 * (moments.variance_y_hat + moments.mean_y_hat.square())
    determined = moments.variance_y_hat > noise
    slope = torch.where(determined, moments.covariance / moments.variance_y_hat, 1.0)
    return slope, moments.mean_y - slope * moments.mean_y_hat
