"""Linear regression of the dense output on the pruned one (SlimLLM, section "linear regression"), folded into weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slimllm import ops


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
