"""Linear regression from second moments: one slope and intercept for every output."""

from __future__ import annotations

import torch

from slimllm.ops.checks import check_dtype, check_floating, check_tensors
from slimllm.ops.registry import operator


def affine_fit(
    mean_y: torch.Tensor, mean_y_hat: torch.Tensor, variance_y_hat: torch.Tensor, covariance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit one linear regression for every output dimension: (a_k, b_k) = argmin E(y_k - a_k ŷ_k - b_k)².

    a_k = cov(y_k, ŷ_k) / var(ŷ_k), b_k = mean(y_k) - a_k mean(ŷ_k). Where ŷ_k is constant up to rounding, the slope
    is undetermined and is set to 1.

    Args:
        mean_y, mean_y_hat, variance_y_hat, covariance: E y, E ŷ, var(ŷ) and cov(y, ŷ), each (D,), population (1/N).

    Returns:
        slope and intercept, both (D,) of the arguments' dtype. Values are not checked: NaN gives NaN.

    Raises:
        ValueError: shapes are not equal.
        TypeError: the arguments do not share one floating dtype.
    """
    arguments = {"mean_y": mean_y, "mean_y_hat": mean_y_hat, "variance_y_hat": variance_y_hat, "covariance": covariance}
    check_tensors(**arguments)
    check_floating(**arguments)
    for name, tensor in arguments.items():
        check_dtype(name, tensor, (mean_y.dtype,))
        if tensor.shape != mean_y.shape:
            raise ValueError(f"{name} must have the shape of mean_y, {tuple(mean_y.shape)}, got {tuple(tensor.shape)}.")
    return _affine_fit(*(tensor.detach() for tensor in arguments.values()))


@operator(
    "affine_fit(Tensor mean_y, Tensor mean_y_hat, Tensor variance_y_hat, Tensor covariance) -> (Tensor, Tensor)",
    shape=lambda mean_y, *others: tuple(torch.empty_like(mean_y, memory_format=torch.contiguous_format) for _ in range(2)),
    only_torch="a few operations on D numbers",
)
def _affine_fit(
    mean_y: torch.Tensor, mean_y_hat: torch.Tensor, variance_y_hat: torch.Tensor, covariance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    # fp32 activations carry relative errors near 1e-7 of |ŷ|, hence variances below (1e-7)²·E[ŷ²] are noise.
    noise = 1e-14 * (variance_y_hat + mean_y_hat.square())
    slope = torch.where(variance_y_hat <= noise, 1.0, covariance / variance_y_hat)
    return slope.contiguous(), (mean_y - slope * mean_y_hat).contiguous()
