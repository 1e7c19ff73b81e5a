"""Half of a Cholesky solution with many right-hand sides, for batches of matrices as wide as a head."""

from __future__ import annotations

import torch

from slimllm.ops.checks import PRECISE, check_dtype, check_tensors
from slimllm.ops.dispatch import backend_of_call, full_precision
from slimllm.ops.registry import Random, operator

# Rows up to which the extension is used: a factor of more does not fit a core's caches, or a tile a GPU's shared memory.
WIDEST = {"cpu": 1024, "cuda": 256}
MOST = 65535  # matrices at once on a GPU


def half_solve_(matrices: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Overwrite R by L⁻¹ R, with symmetric positive definite matrices A = L Lᵀ.

    With it, products with the inverse are symmetric products: R₁ᵀ A⁻¹ R₂ = (L⁻¹ R₁)ᵀ (L⁻¹ R₂). Work: k³/6 + k²m/2
    multiply-adds a matrix, in its dtype.

    Args:
        matrices: A, (batch, k, k) fp32 or fp64; only the lower half is read.
        right: R, (batch, k, m) of the same dtype, contiguous.

    Returns:
        A mask of the matrices that are not positive definite, (batch,). Their results are NaN.

    Raises:
        ValueError: shapes or devices are inconsistent, or R is not contiguous.
        TypeError: a dtype is not one of those above.
    """
    _check(matrices, right)
    if not right.is_contiguous():
        raise ValueError("right must be contiguous, as it is overwritten; give right.contiguous().")
    return _half_solve_(matrices.detach(), right.detach()).bool()


def quadratic_forms(matrices: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute tr(Rᵀ A⁻¹ R) = ‖L⁻¹ R‖² of symmetric positive definite matrices A = L Lᵀ.

    Args:
        matrices: A, (batch, k, k) fp32 or fp64; only the lower half is read.
        right: R, (batch, k, m) of the same dtype; it is not changed.

    Returns:
        The sums, (batch,) fp64, and a mask of the matrices that are not positive definite, (batch,). Their sums are NaN.

    Raises:
        ValueError: shapes or devices are inconsistent.
        TypeError: a dtype is not one of those above.
    """
    _check(matrices, right)
    forms, failed = _quadratic_forms(matrices.detach(), right.detach())
    return forms, failed.bool()


def _check(matrices: torch.Tensor, right: torch.Tensor) -> None:
    check_tensors(matrices=matrices, right=right)
    if matrices.ndim != 3 or matrices.shape[1] != matrices.shape[2] or right.shape[:-1] != matrices.shape[:-1]:
        raise ValueError(
            "matrices and right must have shapes (batch, k, k) and (batch, k, m), "
            f"got {tuple(matrices.shape)} and {tuple(right.shape)}; a single matrix is a batch of one."
        )
    check_dtype("matrices", matrices, PRECISE)
    check_dtype("right", right, (matrices.dtype,))


def _by_extension(operation: str, matrices: torch.Tensor, right: torch.Tensor) -> bool:
    kind = matrices.device.type
    fits = matrices.shape[1] <= WIDEST.get(kind, 0) and right.numel() > 0 and (kind == "cpu" or len(matrices) <= MOST)
    return backend_of_call(operation, matrices.device, fits) == "extension"


def _cases(random: Random, tokens: int) -> list[torch.Tensor]:
    results: list[torch.Tensor] = []
    for size, columns, dtype in (
        (64, 130, torch.float32),
        (40, 1, torch.float64),
        (7, 33, torch.float32),
        (256, 9, torch.float32),
    ):
        a, right = random(3, 2 * size, size).to(dtype), random(3, size, columns).to(dtype)
        matrices = a.mT @ a / (2 * size)
        results.append(quadratic_forms(matrices, right)[0])
        half_solve_(matrices, right)
        results.append(right)
    return results


_EXTENSION = {"cpu": "up to 1024 rows; else torch", "cuda": "up to 256 rows; else torch"}


@operator(
    "half_solve_(Tensor matrices, Tensor(a!) right) -> Tensor",
    shape=lambda matrices, right: matrices.new_empty(len(matrices), dtype=torch.int32),
    cases=_cases,
    extension=_EXTENSION,
)
def _half_solve_(matrices: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if _by_extension("half_solve_", matrices, right):
        return torch.ops.slimllm_C.half_solve_(matrices.contiguous(), right)  # type: ignore[no-any-return]
    factor, failed = _factor(matrices)
    with full_precision(right.device):
        right.copy_(torch.linalg.solve_triangular(factor, right, upper=False))
    right.masked_fill_(failed[:, None, None], torch.nan)
    return failed.int()


def _factor(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    factor, status = torch.linalg.cholesky_ex(matrices)
    return factor, (status != 0) | ~factor.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)


@operator(
    "quadratic_forms(Tensor matrices, Tensor right) -> (Tensor, Tensor)",
    shape=lambda matrices, right: (
        matrices.new_empty(len(matrices), dtype=torch.float64),
        matrices.new_empty(len(matrices), dtype=torch.int32),
    ),
    cases=_cases,
    extension=_EXTENSION,
)
def _quadratic_forms(matrices: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if _by_extension("quadratic_forms", matrices, right):
        return torch.ops.slimllm_C.quadratic_forms(matrices.contiguous(), right.contiguous())  # type: ignore[no-any-return]
    factor, failed = _factor(matrices)
    with full_precision(right.device):
        # A triangular solution with many right-hand sides is slower on a CPU than an inverse and a product.
        one = torch.eye(matrices.shape[1], dtype=matrices.dtype, device=matrices.device)
        half = torch.linalg.solve_triangular(factor, one, upper=False) @ right
    forms = half.square().sum((1, 2), dtype=torch.float64)
    return forms.masked_fill_(failed, torch.nan), failed.int()
