"""Importance of FFN channels in the feature space of the output (SlimLLM, arXiv 2505.22689)."""

from __future__ import annotations

import math

import torch

from slimllm.ops.checks import check_finite, check_floating, check_tensors
from slimllm.ops.dispatch import full_precision
from slimllm.ops.registry import Operation, register

_COLUMNS = 1024
_MOST_VECTORS = 2048  # outputs up to which a CPU computes eigenvectors: at 2048 both methods take 1 s on two cores
_HALF = 512  # rows at a time in which a CPU computes half of a symmetric product

register(Operation("feature_space_importance", only_torch="matrix products and one factorisation, which libraries do best"))


def feature_space_importance(
    down_weight: torch.Tensor, output_covariance: torch.Tensor, channel_norms: torch.Tensor, method: str | None = None
) -> torch.Tensor:
    """Compute the importance of every FFN channel in the feature space of the output.

        I_down(c) = ‖Z[:,c]‖₂ · ‖s ∘ (Vᵀ W_d[:,c])‖₂, with Cov(y) = V Λ Vᵀ and s_j = sigmoid(|λ_j| / mean|λ|).

    `function` needs no eigenvectors: the second factor is the norm of a column of (I + exp(-C/λ̄))⁻¹ W_d, a function of
    the symmetric matrix C = Cov(y). It takes 8 to 16 fp32 products p, all symmetric, and a Cholesky solve: D³·p + D²·I
    multiply-adds, on a CPU D³·p/2 + D²·I, because half of each product is enough. It agrees to 1e-6 with `eigh`, which
    takes 9·D³ fp64 operations that run far below peak rate.

    Args:
        down_weight: down_proj.weight (D, I).
        output_covariance: C, covariance of the outputs of down_proj, (D, D), positive semidefinite up to rounding;
            preferably fp64.
        channel_norms: ‖Z[:,c]‖₂, (I,).
        method: `function`, or `eigh`, which follows the definition. None: `eigh` on a CPU for up to 2048 outputs, else
            `function`: on a CPU it takes 5 s instead of 10 at D = 4096, and 19 instead of 45 at D = 6656 (two cores).

    Returns:
        (I,) fp64.

    Raises:
        ValueError: shapes or devices are inconsistent, a covariance is not finite, or the method is unknown.
        TypeError: a dtype is not a floating dtype.
    """
    check_tensors(down_weight=down_weight, output_covariance=output_covariance, channel_norms=channel_norms)
    check_floating(down_weight=down_weight, output_covariance=output_covariance, channel_norms=channel_norms)
    out_features, channels = down_weight.shape if down_weight.ndim == 2 else (-1, -1)
    if output_covariance.shape != (out_features, out_features) or channel_norms.shape != (channels,):
        raise ValueError(
            "down_weight, output_covariance and channel_norms must have shapes (D, I), (D, D) and (I,), "
            f"got {tuple(down_weight.shape)}, {tuple(output_covariance.shape)} and {tuple(channel_norms.shape)}."
        )
    check_finite("output_covariance", output_covariance)
    on_gpu = output_covariance.device.type != "cpu"
    method = method or ("eigh" if computes_vectors(out_features, on_gpu) else "function")
    if method not in ("function", "eigh"):
        raise ValueError(f"method must be function or eigh, got {method!r}.")
    # At least fp32: half precision changes which channels are kept.
    weight, output_covariance = down_weight.float(), output_covariance.double()
    mean = float(output_covariance.diagonal().mean())  # mean eigenvalue
    if mean <= 0:  # a constant output, up to rounding
        return channel_norms * torch.linalg.vector_norm(weight, dim=0, dtype=torch.float64) / 2
    if method == "eigh":
        eigenvalues, vectors = torch.linalg.eigh(output_covariance)
        eigenvalues = eigenvalues.abs()
        axes = vectors.mul_(torch.sigmoid(eigenvalues / eigenvalues.mean())).T.float()
        del vectors
    else:
        axes = _sigmoid_root((output_covariance / mean).float())
    norms = []
    with full_precision(weight.device):
        for some in weight.split(_COLUMNS, 1):  # bounds memory: never the features of all channels
            features = axes @ some if method == "eigh" else torch.cholesky_solve(some, axes)
            norms.append(torch.linalg.vector_norm(features, dim=0, dtype=torch.float64))
    return channel_norms * torch.cat(norms)


def computes_vectors(out_features: int, on_gpu: bool) -> bool:
    """Return whether `feature_space_importance` computes eigenvectors by default."""
    return not on_gpu and out_features <= _MOST_VECTORS


def _sigmoid_root(matrix: torch.Tensor) -> torch.Tensor:
    """Return the Cholesky factor of I + exp(-M) for a symmetric positive semidefinite M (D, D) fp32; M is overwritten.

    A = -M/2ᵏ has a norm of at most 1/4. F = expm1(A) is the Taylor series to degree 6 (in A and A³: 3 products; the next
    term is 1e-8), squared k times by F ← 2F + F². expm1 instead of exp keeps the digits of small eigenvalues. The
    condition number of 2I + F is at most 2. All factors are symmetric and commute, so all products are symmetric.
    """
    with full_precision(matrix.device):
        square = _symmetric_product(matrix, matrix)
        bound = math.sqrt(float(torch.linalg.matrix_norm(square)))  # (Σλ⁴)^¼, at least the largest eigenvalue
        squarings = max(0, math.ceil(math.log2(4 * bound))) if bound > 0 else 0
        a, square = matrix.mul_(-(0.5**squarings)), square.mul_(0.25**squarings)
        cube = _symmetric_product(a, square)
        tail = (a / 24).add_(square, alpha=1 / 120).add_(cube, alpha=1 / 720)
        tail.diagonal().add_(1 / 6)
        expm1 = _symmetric_product(cube, tail).add_(a).add_(square, alpha=0.5)
        del a, square, cube, tail
        for _ in range(squarings):
            expm1 = _symmetric_product(expm1, expm1).add_(expm1, alpha=2)
        expm1.diagonal().add_(2)
        return torch.linalg.cholesky(expm1)


def _symmetric_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the product of two symmetric matrices that commute; on a CPU only its lower half is computed, and mirrored."""
    if a.device.type != "cpu":
        product = a @ b
        return (product + product.T).div_(2)
    product = torch.empty_like(a)
    for start in range(0, len(a), _HALF):
        stop = min(start + _HALF, len(a))
        torch.mm(a[start:stop], b[:, :stop], out=product[start:stop, :stop])
        product[:start, start:stop] = product[start:stop, :start].T
    return product
