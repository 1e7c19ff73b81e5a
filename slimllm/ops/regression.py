"""Linear regression from second moments: one slope and intercept for every output, or all weights at once."""

from __future__ import annotations

import torch

from slimllm.ops.checks import check_dtype, check_floating, check_tensors


def affine_fit(
    mean_y: torch.Tensor, mean_y_hat: torch.Tensor, variance_y_hat: torch.Tensor, covariance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(a_k, b_k) = argmin E(y_k - a_k ŷ_k - b_k)², one regression for every output dimension.

    a_k = cov(y_k, ŷ_k) / var(ŷ_k), b_k = mean(y_k) - a_k mean(ŷ_k). Where ŷ_k is constant, up to rounding, the slope
    is not determined and stays 1.

    Args:
        mean_y, mean_y_hat, variance_y_hat, covariance: E y, E ŷ, var(ŷ) and cov(y, ŷ), each (D,), population (1/N).

    Returns:
        slope and intercept, both (D,) of the arguments' dtype.

    Raises:
        ValueError: shapes are not equal.
        TypeError: the dtypes are not one floating dtype.
    """
    arguments = {"mean_y": mean_y, "mean_y_hat": mean_y_hat, "variance_y_hat": variance_y_hat, "covariance": covariance}
    check_tensors(**arguments)
    check_floating(**arguments)
    for name, tensor in arguments.items():
        check_dtype(name, tensor, (mean_y.dtype,))
        if tensor.shape != mean_y.shape:
            raise ValueError(f"{name} must have the shape of mean_y, {tuple(mean_y.shape)}, got {tuple(tensor.shape)}.")
    # fp32 activations carry relative errors near 1e-7 of |ŷ|, hence variances below (1e-7)²·E[ŷ²] are noise.
    noise = 1e-14 * (variance_y_hat + mean_y_hat.square())
    slope = torch.where(variance_y_hat <= noise, 1.0, covariance / variance_y_hat)
    return slope, mean_y - slope * mean_y_hat


def lstsq(gram: torch.Tensor, cross: torch.Tensor, ridge: float | torch.Tensor = 0.0) -> torch.Tensor:
    """X_b = argmin tr(Xᵀ(G_b + λ_b I)X - 2 Xᵀ R_b): a batch of least-squares problems from their normal equations.

    With G = AᵀA and R = AᵀB it is the ridge regression of B on A. Factored in fp64, with G scaled to a unit diagonal. A
    system that is singular to working precision gets the least of the ridges 1e-12, 1e-10, … that makes it regular.

    Args:
        gram: G, (batch, k, k) fp32 or fp64, symmetric positive semidefinite; its lower half is read.
        cross: R, (batch, k, m), of the same dtype.
        ridge: λ relative to the mean of the system's diagonal, not negative; a number, or (batch,) one for each system.

    Returns:
        X, (batch, k, m), of the arguments' dtype.

    Raises:
        ValueError: shapes or devices do not fit together, the ridge is negative, or a value is not finite.
        TypeError: a dtype is none of those above.
    """
    check_tensors(gram=gram, cross=cross)
    if gram.ndim != 3 or gram.shape[1] != gram.shape[2] or cross.ndim != 3 or cross.shape[:2] != gram.shape[:2]:
        raise ValueError(
            f"gram and cross must have shapes (batch, k, k) and (batch, k, m), "
            f"got {tuple(gram.shape)} and {tuple(cross.shape)}."
        )
    if gram.dtype not in (torch.float32, torch.float64) or cross.dtype != gram.dtype:
        raise TypeError(f"gram and cross must both be float32 or both float64, got {gram.dtype} and {cross.dtype}.")
    relative = torch.as_tensor(ridge, dtype=torch.float64, device=gram.device)
    if relative.shape not in ((), gram.shape[:1]):
        raise ValueError(f"ridge must be a number or have shape ({gram.shape[0]},), got {tuple(relative.shape)}.")
    if not bool((relative >= 0).all()) or not bool(
        gram.isfinite().all() & cross.isfinite().all() & relative.isfinite().all()
    ):
        raise ValueError("gram and cross must be finite, and ridge finite and not negative.")
    if gram.numel() == 0 or cross.numel() == 0:
        return torch.zeros_like(cross)

    matrix, right = gram.double(), cross.double()
    size = matrix.shape[-1]
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    negative = (diagonal < 0).any(-1)
    if bool(negative.any()):
        raise ValueError(f"{int(negative.sum())} of {len(gram)} systems have a negative number on the diagonal of gram.")
    mean = diagonal.mean(-1, keepdim=True)
    ridge_of = relative.expand(len(gram)).clone()
    scaled, scale = _with_ridge(matrix, diagonal, mean, ridge_of)
    factor, status = torch.linalg.cholesky_ex(scaled)
    raised = 1e-12
    while bool((failed := _singular(factor, status, size)).any()) and raised <= 1:
        ridge_of = torch.where(failed, torch.maximum(ridge_of, torch.full_like(ridge_of, raised)), ridge_of)
        scaled, scale = _with_ridge(matrix, diagonal, mean, ridge_of)
        factor, status = torch.linalg.cholesky_ex(scaled)
        raised *= 100
    if bool(failed.any()):
        raise ValueError(f"{int(failed.sum())} of {len(gram)} systems are not positive semidefinite.")
    return (scale[..., None] * torch.cholesky_solve(right * scale[..., None], factor)).to(cross.dtype)


def _with_ridge(
    matrix: torch.Tensor, diagonal: torch.Tensor, mean: torch.Tensor, ridge: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """S(G + λI)S with a unit diagonal, and S; a dead column, of which nothing is known, has S = 0, hence X = 0."""
    full = diagonal + ridge[:, None] * mean
    scale = torch.where(diagonal > 0, full.rsqrt(), 0.0)
    scaled = matrix * scale[:, :, None] * scale[:, None, :]
    scaled.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return scaled, scale


def _singular(factor: torch.Tensor, status: torch.Tensor, size: int) -> torch.Tensor:
    pivots = factor.diagonal(dim1=-2, dim2=-1).square().amin(-1)
    return (status != 0) | ~(pivots > size * torch.finfo(torch.float64).eps)
