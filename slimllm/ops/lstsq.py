"""Batches of ridge regressions from their normal equations: the C++ extension for small systems, torch for all others."""

from __future__ import annotations

import logging
import numbers

import torch

from slimllm.ops.checks import PRECISE, check_dtype, check_tensors
from slimllm.ops.dispatch import choose
from slimllm.ops.library import operator

# Where the extension is faster than the torch path below: up to so many unknowns and right-hand sides, and enough
# systems to fill three quarters of its lanes.
LARGEST, MOST_COLUMNS = 128, 16
LANES = 8
# Automatic ridges, relative to the mean diagonal, in powers of 100; a system that needs more is not semidefinite.
FIRST_RIDGE, LAST_RIDGE = 1e-12, 1e-4

_log = logging.getLogger("slimllm")


def lstsq(
    gram: torch.Tensor,
    cross: torch.Tensor,
    ridge: float | torch.Tensor = 0.0,
    *,
    absolute: bool = False,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """X_b = argmin tr(Xᵀ G_b X - 2 Xᵀ R_b) + λ_b ‖X - W_b‖²: a batch of least-squares problems from their normal equations.

    With G = AᵀA and R = AᵀB it is the ridge regression of B on A, shrunk towards W (0 if there is none):

        X = W + (G + λI)⁻¹ (R - G W).

    Factored in fp64, with G + λI scaled to a unit diagonal. A system that is singular to working precision gets the least
    of the ridges 1e-12, 1e-10, … 1e-4 of its mean diagonal that makes it regular, which a warning reports; `lstsq_ex`
    returns the ridges. Work: k³/3 + 2k²m multiply-adds a system.

    Args:
        gram: G, (batch, k, k) fp32 or fp64, symmetric positive semidefinite, any strides; the lower half counts.
        cross: R, (batch, k, m), of the same dtype.
        ridge: λ, not negative; a number, or (batch,) one for each system. Relative to the mean of the system's diagonal,
            or, if `absolute`, as it is.
        absolute: See `ridge`.
        start: W, (batch, k, m) of the same dtype.

    Returns:
        X, (batch, k, m), of the arguments' dtype. Of a column whose diagonal is 0, of which nothing is known, it is W.
        No gradients are defined.

    Raises:
        ValueError: shapes or devices do not fit together, a value is not finite, a ridge is negative, or a system is not
            positive semidefinite.
        TypeError: a dtype is none of those above.
    """
    return lstsq_ex(gram, cross, ridge, absolute=absolute, start=start)[0]


def lstsq_ex(
    gram: torch.Tensor,
    cross: torch.Tensor,
    ridge: float | torch.Tensor = 0.0,
    *,
    absolute: bool = False,
    start: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`lstsq`, and the ridge that each system was solved with: (batch,) fp64, absolute."""
    check_tensors(gram=gram, cross=cross, **({} if start is None else {"start": start}))
    if gram.ndim != 3 or gram.shape[1] != gram.shape[2] or cross.ndim != 3 or cross.shape[:2] != gram.shape[:2]:
        raise ValueError(
            "gram and cross must have shapes (batch, k, k) and (batch, k, m), "
            f"got {tuple(gram.shape)} and {tuple(cross.shape)}; a single system is a batch of one."
        )
    check_dtype("gram", gram, PRECISE)
    check_dtype("cross", cross, (gram.dtype,))
    if start is not None:
        check_dtype("start", start, (gram.dtype,))
        if start.shape != cross.shape:
            raise ValueError(f"start must have the shape of cross, {tuple(cross.shape)}, got {tuple(start.shape)}.")
    if not isinstance(absolute, bool):
        raise TypeError(f"absolute must be True or False, got {absolute!r}.")
    if not isinstance(ridge, (numbers.Real, torch.Tensor)):
        raise TypeError(f"ridge must be a number or a tensor, got {type(ridge).__name__}.")
    wanted = torch.as_tensor(ridge, dtype=torch.float64, device=gram.device)
    if wanted.shape not in ((), gram.shape[:1]):
        raise ValueError(f"ridge must be a number or have shape ({gram.shape[0]},), got {tuple(wanted.shape)}.")
    wanted = wanted.expand(len(gram)).contiguous().detach()
    gram, cross, start = gram.detach(), cross.detach(), None if start is None else start.detach()
    if gram.numel():
        _check_diagonal_and_ridge(gram, wanted)
    solution, used = _lstsq(gram, cross, wanted, absolute, start)
    # What is not finite on the way in is not finite on the way out, where there is less to look at.
    if not bool(solution.isfinite().all() & used.isfinite().all()):
        _explain(gram, cross, start, used)
    _report(gram, wanted, used, absolute)
    return solution, used


def _check_diagonal_and_ridge(gram: torch.Tensor, ridge: torch.Tensor) -> None:
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    absolute = ridge * diagonal.double().mean(-1).clamp(min=1)
    facts = [(ridge >= 0).all(), absolute.isfinite().all() | ~diagonal.isfinite().all(), (diagonal > 0).all()]
    not_negative, finite, positive = torch.stack(facts).tolist()  # one wait for the device
    if not finite:
        raise ValueError(f"ridge must be finite, relative to the diagonal too, got {float(ridge.max()):g}.")
    if not not_negative:
        raise ValueError(f"ridge must not be negative, got {float(ridge.min()):g}.")
    if not positive:
        # Where a diagonal is 0, so are its row and column, or the system is not semidefinite.
        bad = (diagonal < 0) | ((diagonal == 0) & (torch.linalg.vector_norm(gram, torch.inf, dim=-1) > 0))
        if bool(bad.any()):
            raise ValueError(
                f"{int(bad.any(-1).sum())} of {len(gram)} systems are not positive semidefinite: the diagonal of gram is "
                "negative, or 0 beside other numbers."
            )


def _explain(gram: torch.Tensor, cross: torch.Tensor, start: torch.Tensor | None, used: torch.Tensor) -> None:
    """Raise the error that a solution with NaN or infinity comes from."""
    named = {"gram": gram.tril(), "cross": cross} | ({} if start is None else {"start": start})
    for name, tensor in named.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity.")
    failed = int(used.isnan().sum())
    if failed:
        raise ValueError(f"{failed} of {len(gram)} systems are not positive semidefinite.")
    raise ValueError(f"the solution leaves the range of {cross.dtype}; scale gram and cross, or use float64.")


def _report(gram: torch.Tensor, wanted: torch.Tensor, used: torch.Tensor, absolute: bool) -> None:
    if not gram.numel():
        return
    mean = gram.diagonal(dim1=-2, dim2=-1).double().mean(-1)
    raised = used > (wanted if absolute else wanted * mean) * (1 + 1e-9)
    if bool(raised.any()):
        most = float((used / mean)[raised].max())
        _log.warning(
            "lstsq: %d of %d systems are singular to working precision; they were solved with ridges up to %.0e of their "
            "mean diagonal.", int(raised.sum()), len(gram), most,
        )  # fmt: skip


@operator(
    "lstsq(Tensor gram, Tensor cross, Tensor ridge, bool absolute, Tensor? start) -> (Tensor, Tensor)",
    shape=lambda gram, cross, ridge, absolute, start: (torch.empty_like(cross, memory_format=torch.contiguous_format),
                                                       torch.empty_like(ridge)),
)  # fmt: skip
def _lstsq(
    gram: torch.Tensor, cross: torch.Tensor, ridge: torch.Tensor, absolute: bool, start: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if gram.numel() == 0 or cross.numel() == 0:
        empty = gram.numel() == 0
        used = ridge.clone() if absolute or empty else ridge * gram.diagonal(dim1=-2, dim2=-1).double().mean(-1)
        return torch.zeros_like(cross, memory_format=torch.contiguous_format), used
    batch, size, columns = *gram.shape[:2], cross.shape[2]
    lanes = -(-batch // LANES) * LANES
    if (
        size <= LARGEST
        and columns <= MOST_COLUMNS
        and 4 * batch >= 3 * lanes
        and choose("lstsq", gram.device).backend == "extension"
    ):
        contiguous = None if start is None else start.contiguous()
        solution, used = torch.ops.slimllm_C.small_lstsq(gram.contiguous(), cross.contiguous(), ridge, absolute, contiguous)
        return solution, used
    matrix, right = gram.double(), cross.double()
    if start is not None:
        right = right - (matrix.tril() + matrix.tril(-1).mT) @ start.double()
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1)
    used = ridge.clone() if absolute else ridge * mean
    factor, scale, failed = _factor(matrix, diagonal, used)
    raised = FIRST_RIDGE
    while bool(failed.any()) and raised <= 1.001 * LAST_RIDGE:
        used = torch.where(failed, torch.maximum(used, raised * mean), used)
        factor, scale, failed = _factor(matrix, diagonal, used)
        raised *= 100
    solution = scale[..., None] * torch.cholesky_solve(right * scale[..., None], factor)
    if start is not None:
        solution += start.double()
    solution[failed] = torch.nan
    return solution.to(cross.dtype).contiguous(), torch.where(failed, torch.nan, used)


def _factor(
    matrix: torch.Tensor, diagonal: torch.Tensor, ridge: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """L of S(G + λI)S, of unit diagonal, S, which is 0 for a column of zeros, and which systems are singular.

    Of G the lower half is read. Two matrices are in memory at the most beside it, at (batch, k, k) fp64 each.
    """
    scale = torch.where(diagonal > 0, (diagonal + ridge[:, None]).rsqrt(), 0.0)
    scaled = (matrix * scale[:, :, None]).mul_(scale[:, None, :])
    scaled.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    factor, status = torch.linalg.cholesky_ex(scaled)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square().amin(-1)
    return factor, scale, (status != 0) | ~(pivots > matrix.shape[-1] * torch.finfo(torch.float64).eps)
