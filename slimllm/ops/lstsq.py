"""Batched ridge regression from normal equations. The extension solves small systems, torch all others."""

from __future__ import annotations

import logging
import numbers

import torch

from slimllm.ops.checks import PRECISE, check_dtype, check_tensors
from slimllm.ops.dispatch import backend_of_call, full_precision
from slimllm.ops.registry import Random, operator

# Limits within which the extension is faster than the torch path below: unknowns and right-hand sides by device. On a GPU a
# warp solves a system, whose size its shared memory limits.
LARGEST = {"cpu": 256, "cuda": 64}
MOST_COLUMNS = {"cpu": 2**31, "cuda": 16}
# Ridges, relative to the mean diagonal, tried in turn for a singular system. A system that needs more is not semidefinite.
RIDGES = (0.0, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4)
# Bits of the status that `torch.ops.slimllm.lstsq` returns for a system. FAILED: it was not solved. ZEROS: it has columns
# with a diagonal of 0, whose other elements were not checked.
FAILED, ZEROS = 1, 2

_log = logging.getLogger("slimllm.ops")


def lstsq(
    gram: torch.Tensor, cross: torch.Tensor, ridge: float | torch.Tensor = 0.0, *, absolute: bool = False
) -> torch.Tensor:
    """Solve a batch of least-squares problems from their normal equations: X_b = argmin tr(Xᵀ G_b X - 2 Xᵀ R_b) + λ_b ‖X‖².

    With G = AᵀA and R = AᵀB this is the ridge regression of B on A:

        X = (G + λI)⁻¹ R.

    Systems are factored in fp64 whatever their dtype; small systems on a GPU are factored in fp32 and refined until the
    residual is that of fp64 arithmetic. A system that is singular to fp64's precision gets the smallest of the ridges
    1e-12, 1e-10, … 1e-4 of its mean diagonal that makes it regular. A warning reports this, and `lstsq_ex` returns the
    ridges. Work: k³/6 + k²m multiply-adds a system.

    Args:
        gram: G, (batch, k, k) fp32 or fp64, symmetric positive semidefinite, any strides; only the lower half is read.
        cross: R, (batch, k, m), of the same dtype.
        ridge: λ, not negative: a number, or (batch,) with one for each system. It is relative to the mean of the
            system's diagonal unless `absolute` is set.
        absolute: Do not scale `ridge` by the diagonal.

    Returns:
        X, (batch, k, m), of the arguments' dtype. An unknown whose diagonal is 0 is undetermined, and its solution is 0.
        No gradients are defined.

    Raises:
        ValueError: shapes or devices are inconsistent, a value is not finite, a ridge is negative, or a system is not
            positive semidefinite.
        TypeError: a dtype is not one of those above.
    """
    return lstsq_ex(gram, cross, ridge, absolute=absolute)[0]


def lstsq_ex(
    gram: torch.Tensor, cross: torch.Tensor, ridge: float | torch.Tensor = 0.0, *, absolute: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the solution of `lstsq` and the absolute ridge that each system was solved with, (batch,) fp64."""
    check_tensors(gram=gram, cross=cross)
    if gram.ndim != 3 or gram.shape[1] != gram.shape[2] or cross.ndim != 3 or cross.shape[:2] != gram.shape[:2]:
        raise ValueError(
            "gram and cross must have shapes (batch, k, k) and (batch, k, m), "
            f"got {tuple(gram.shape)} and {tuple(cross.shape)}; a single system is a batch of one."
        )
    check_dtype("gram", gram, PRECISE)
    check_dtype("cross", cross, (gram.dtype,))
    if not isinstance(absolute, bool):
        raise TypeError(f"absolute must be True or False, got {absolute!r}.")
    if not isinstance(ridge, (numbers.Real, torch.Tensor)):
        raise TypeError(f"ridge must be a number or a tensor, got {type(ridge).__name__}.")
    if isinstance(ridge, torch.Tensor):
        wanted = ridge.detach().to(gram.device, torch.float64)
        if wanted.shape not in ((), gram.shape[:1]):
            raise ValueError(f"ridge must be a number or have shape ({gram.shape[0]},), got {tuple(wanted.shape)}.")
        wanted = wanted.expand(len(gram)).contiguous()
    else:
        wanted = torch.full(gram.shape[:1], float(ridge), dtype=torch.float64, device=gram.device)
    gram, cross = gram.detach(), cross.detach()
    solution, used, status = _attempt(gram, cross, wanted, absolute)
    if bool(status.any()):  # the only synchronisation with the device
        _check_values(gram, cross, wanted, absolute)
        failed = (status & FAILED).nonzero()[:, 0]
        if len(failed):
            _solve_again(failed, gram, cross, solution, used)
    return solution, used


def _check_values(gram: torch.Tensor, cross: torch.Tensor, ridge: torch.Tensor, absolute: bool) -> None:
    """Raise an error if the arguments explain why a system was not solved."""
    sizes = gram.tril().abs_()  # a single copy: gram may be as large as memory allows
    beside = torch.maximum(sizes.amax(-1), sizes.amax(-2))  # propagates NaN and infinity
    for name, tensor in (("gram", beside), ("cross", cross)):
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity.")
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    if not bool((ridge if absolute else ridge * diagonal.double().mean(-1)).isfinite().all()):
        raise ValueError(f"ridge must be finite, also when scaled by the diagonal, got {float(ridge.max()):g}.")
    if bool((ridge < 0).any()):
        raise ValueError(f"ridge must not be negative, got {float(ridge.min()):g}.")
    # In a semidefinite system, the row and column of a diagonal of 0 are 0.
    bad = (diagonal < 0) | ((diagonal == 0) & (beside > 0))
    if bool(bad.any()):
        raise ValueError(
            f"{int(bad.any(-1).sum())} of {len(gram)} systems are not positive semidefinite: the diagonal of gram is "
            "negative, or 0 in a row or column that is not."
        )


def _solve_again(
    rows: torch.Tensor, gram: torch.Tensor, cross: torch.Tensor, solution: torch.Tensor, used: torch.Tensor
) -> None:
    """Solve the systems `rows` in fp64 with the smallest sufficient ridge; write to `solution` and `used`."""
    raised, most = 0, 0.0
    for least in RIDGES:
        few = len(rows) < len(gram)
        g, r = (t[rows] if few else t for t in (gram, cross))
        ridge = torch.maximum(used[rows], least * g.diagonal(dim1=-2, dim2=-1).double().mean(-1))
        x, failed = _factor_and_solve(g, r, ridge)
        done = rows[~failed]
        if not bool(x[~failed].to(cross.dtype).isfinite().all()):
            raise ValueError(f"the solution leaves the range of {cross.dtype}; scale gram and cross, or use float64.")
        solution[done], used[done] = x[~failed].to(cross.dtype), ridge[~failed]
        if least and len(done):
            raised, most = raised + len(done), least
        rows = rows[failed]
        if not len(rows):
            break
    else:
        raise ValueError(f"{len(rows)} of {len(gram)} systems are not positive semidefinite.")
    if raised:
        _log.warning(
            "lstsq: %d of %d systems are singular to working precision; they were solved with ridges up to %.0e of their "
            "mean diagonal.",
            raised,
            len(gram),
            most,
        )


def _attempt(
    gram: torch.Tensor, cross: torch.Tensor, ridge: torch.Tensor, absolute: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Solve once, without waiting for a GPU; return solutions (NaN where it failed), absolute ridges and statuses."""
    if ridge.shape != gram.shape[:1]:
        raise ValueError(f"ridge must have shape ({gram.shape[0]},), got {tuple(ridge.shape)}.")
    size, columns = gram.shape[1], cross.shape[2]
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    if gram.numel() == 0 or cross.numel() == 0:
        used = ridge.clone() if absolute or gram.numel() == 0 else ridge * diagonal.double().mean(-1)
        zeros = torch.zeros_like(cross, memory_format=torch.contiguous_format)
        return zeros, used, FAILED * (~(ridge >= 0)).int()
    fits = size <= LARGEST.get(gram.device.type, 0) and columns <= MOST_COLUMNS.get(gram.device.type, 0)
    if backend_of_call("lstsq", gram.device, fits) == "extension":
        return torch.ops.slimllm_C.small_lstsq(gram.contiguous(), cross.contiguous(), ridge, absolute)  # type: ignore[no-any-return]
    used = ridge.clone() if absolute else ridge * diagonal.double().mean(-1)
    with full_precision(gram.device):
        precise, failed = _factor_and_solve(gram, cross, used)
    solution = precise.to(gram.dtype)
    # The sum propagates NaN and infinity. Large numbers may overflow it; their systems are then solved again.
    failed |= ~(ridge >= 0) | ~(diagonal >= 0).all(-1) | ~solution.sum((-2, -1)).isfinite()
    if solution.is_cuda or bool(failed.any()):  # on a CPU, reading is cheaper than writing
        solution.masked_fill_(failed[:, None, None], torch.nan)
    return solution, used, FAILED * failed.int() + ZEROS * (diagonal == 0).any(-1).int()


def _cases(random: Random, tokens: int) -> list[torch.Tensor]:
    results: list[torch.Tensor] = []
    for size, rights, dtype in ((64, 3, torch.float32), (33, 1, torch.float64), (8, 16, torch.float32)):
        a, b = random(50, 2 * size, size).to(dtype), random(50, 2 * size, rights).to(dtype)
        ridge = random(50).abs().double()
        # Not lstsq_ex, which would solve a kernel's failed systems again and hide the failure.
        results += torch.ops.slimllm.lstsq(a.mT @ a, a.mT @ b, 1e-3 * ridge, False)
        results += torch.ops.slimllm.lstsq(a.mT @ a, a.mT @ b, ridge, True)
    return results


operator(
    "lstsq(Tensor gram, Tensor cross, Tensor ridge, bool absolute) -> (Tensor, Tensor, Tensor)",
    shape=lambda gram, cross, ridge, absolute: (
        torch.empty_like(cross, memory_format=torch.contiguous_format),
        torch.empty_like(ridge),
        torch.empty_like(ridge, dtype=torch.int32),
    ),
    cases=_cases,
    extension={"cpu": "up to 256 unknowns; else torch", "cuda": "up to 64 unknowns and 16 right-hand sides; else torch"},
)(_attempt)


def _factor_and_solve(gram: torch.Tensor, cross: torch.Tensor, ridge: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return X in fp64 and a mask of the systems that are singular to its precision.

    Only the lower half of G is read. Extra memory: G + λI in fp64, overwritten by its factor, and twice X.
    """
    cross = cross.double()
    # Stored by rows: LAPACK, which reads by columns, sees the upper half and factors it in place.
    system = gram.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    diagonal = system.diagonal(dim1=-2, dim2=-1)
    known = diagonal > 0
    diagonal.copy_(torch.where(known, diagonal + ridge[:, None], 1.0))
    before = diagonal.clone()
    upper, status = system.mT, torch.empty(len(gram), dtype=torch.int32, device=gram.device)
    torch.linalg.cholesky_ex(upper, upper=True, out=(upper, status))
    pivots = (diagonal.square() / before).amin(-1)
    least = gram.shape[-1] * torch.finfo(torch.float64).eps
    right = cross if not cross.is_cuda and bool(known.all()) else torch.where(known[..., None], cross, 0.0)
    half = torch.linalg.solve_triangular(upper.mT, right, upper=False)
    del right, cross  # as large as the solution
    solution = torch.linalg.solve_triangular(upper, half, upper=True)
    return solution.contiguous(), (status != 0) | ~(pivots > least)
