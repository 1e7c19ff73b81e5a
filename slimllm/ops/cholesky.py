"""Cholesky factor, inverse and solution of one large system, in place, by panels of columns.

A system of many thousand unknowns is the largest tensor of a run. Everything here overwrites it and needs only some panels
beside it, on any device. Products, which are nearly all of the work, are large matrix products. On a CPU, LAPACK factors in
place what is not faster by panels, and all solutions are its own.
"""

from __future__ import annotations

from typing import Protocol

import torch

from slimllm.ops.checks import PRECISE, check_dtype, check_tensors
from slimllm.ops.dispatch import full_precision

PANEL = 256  # columns
# On a CPU, a factor is by panels of this width between these numbers of unknowns. Below, a panel's products are too small
# for several threads, also those of an inverse; above, each panel reads more than fits in a cache, and LAPACK is faster.
NARROW, FROM, UP_TO = 128, 1280, 6144


class Sharing(Protocol):
    """Processes that share the work, see `slimllm.runtime.distributed.Ranks`."""

    rank: int
    size: int

    def broadcast_(self, tensor: torch.Tensor, rank: int) -> None: ...


def factorise_(system: torch.Tensor, ranks: Sharing | None = None) -> torch.Tensor:
    """Overwrite the lower half of a symmetric positive definite A by its factor L, with A = L Lᵀ; the rest is not read.

    Work: k³/6 multiply-adds in its dtype, shared by the processes. Extra memory: two panels at most.

    Args:
        system: A, (k, k) fp32 or fp64, contiguous.
        ranks: Processes with the same system, whose panels they factor in turn. All of them have the whole factor
            afterwards, the same to the last bit; it differs by rounding from that of another number of processes.

    Returns:
        Whether A is not positive definite, a scalar bool tensor on its device. L is then of no use.

    Raises:
        ValueError: the system is not a contiguous matrix.
        TypeError: its dtype is not one of those above.
    """
    _check(system)
    size = len(system)
    failed = torch.zeros((), dtype=torch.bool, device=system.device)
    with torch.no_grad(), full_precision(system.device):
        if ranks is not None and ranks.size > 1 and size:
            return _factorise_together(system, ranks)
        if system.device.type == "cpu" and not FROM < size <= UP_TO:
            upper, status = system.mT, torch.empty((), dtype=torch.int32)  # in place: LAPACK reads by columns
            torch.linalg.cholesky_ex(upper, upper=True, out=(upper, status))
            return status != 0
        width = NARROW if system.device.type == "cpu" else PANEL
        for start in range(0, size, width):
            stop = min(start + width, size)
            panel = system[start:, start:stop]
            panel.addmm_(system[start:, :start], system[start:stop, :start].T, alpha=-1)
            failed |= _factorise_panel(panel)
    return failed


def _factorise_panel(panel: torch.Tensor) -> torch.Tensor:
    """Factor a panel (rows, width) whose upper square is on the diagonal; return whether that is not positive definite."""
    width = panel.shape[1]
    diagonal, status = torch.linalg.cholesky_ex(panel[:width])
    panel[:width] = diagonal
    if len(panel) > width:
        panel[width:] = panel[width:] @ _inverse(diagonal).T
    return status != 0


def _factorise_together(system: torch.Tensor, ranks: Sharing) -> torch.Tensor:
    """Factor panels in turn; everyone subtracts the products of a new panel from its own later ones."""
    size = len(system)
    for number, start in enumerate(range(0, size, PANEL)):
        stop, owner = min(start + PANEL, size), number % ranks.size
        panel = system[start:, start:stop].contiguous()
        if owner == ranks.rank and bool(_factorise_panel(panel)):
            panel.fill_(torch.nan)
        ranks.broadcast_(panel, owner)
        system[start:, start:stop] = panel
        for later in range(start + PANEL * ((ranks.rank - owner - 1) % ranks.size + 1), size, PANEL * ranks.size):
            rows = panel[later - start :]
            system[later:, later : later + PANEL].addmm_(rows, rows[:PANEL].T, alpha=-1)
    return system[-1, -1].isnan()  # a NaN spreads to all later panels


def invert_(factor: torch.Tensor) -> torch.Tensor:
    """Overwrite L by the lower half of (L Lᵀ)⁻¹, and return it; the upper half is neither read nor of use.

    Work: k³/3 multiply-adds in its dtype. Extra memory: one panel.

    Args:
        factor: As from `factorise_`, (k, k).
    """
    _check(factor)
    size = len(factor)
    starts = range(0, size, PANEL)
    with torch.no_grad(), full_precision(factor.device):
        if factor.device.type == "cpu" and size <= FROM:
            return factor.copy_(torch.cholesky_inverse(factor))
        for start in reversed(starts):  # L⁻¹ by columns, each from its last row on
            stop = min(start + PANEL, size)
            own = factor[start:stop, start:stop] = _inverse(factor[start:stop, start:stop])  # with zeros above
            for row in reversed(range(stop, size, PANEL)):
                rows = slice(row, min(row + PANEL, size))
                factor[rows, start:stop] = (
                    factor[rows, stop : rows.stop] @ factor[stop : rows.stop, start:stop]
                ) @ own.neg()
        for start in starts:  # L⁻ᵀ L⁻¹ by rows
            stop = min(start + PANEL, size)
            factor[start:stop, :stop] = factor[start:, start:stop].T @ factor[start:, :stop]
    return factor


def solve_(factor: torch.Tensor, right: torch.Tensor, zero_rows: int = 0) -> torch.Tensor:
    """Overwrite R by (L Lᵀ)⁻¹ R, and return it.

    Work: k²m multiply-adds. Extra memory: PANEL rows of R; on a CPU none.

    Args:
        factor: As from `factorise_`, (k, k).
        right: R, (k, m) of the same dtype.
        zero_rows: Number of first rows of R that are 0, for which there is nothing to do at first.
    """
    _check(factor)
    check_tensors(factor=factor, right=right)
    if right.ndim != 2 or len(right) != len(factor) or right.dtype != factor.dtype:
        raise ValueError(
            f"right must be ({len(factor)}, m) {factor.dtype} like the factor, got {tuple(right.shape)} {right.dtype}."
        )
    size, in_one_piece = len(factor), _solves_in_one_piece(factor)
    starts = range(0, size, PANEL)
    first = zero_rows // PANEL * PANEL
    transposed = right.mT  # Rᵀ is stored by columns, as LAPACK wants it
    with torch.no_grad(), full_precision(factor.device):
        if in_one_piece and not first:
            torch.linalg.solve_triangular(factor.mT, transposed, upper=True, left=False, out=transposed)
        else:
            for start in range(first, size, PANEL):
                rows = slice(start, min(start + PANEL, size))
                right[rows].addmm_(factor[rows, first:start], right[first:start], alpha=-1)
                right[rows] = _inverse(factor[rows, rows]) @ right[rows]
        if in_one_piece:
            torch.linalg.solve_triangular(factor, transposed, upper=False, left=False, out=transposed)
            return right
        for start in reversed(starts):
            rows = slice(start, min(start + PANEL, size))
            right[rows].addmm_(factor[rows.stop :, rows].T, right[rows.stop :], alpha=-1)
            right[rows] = _inverse(factor[rows, rows]).T @ right[rows]
    return right


def _solves_in_one_piece(factor: torch.Tensor) -> bool:
    return factor.device.type == "cpu"


def _inverse(lower: torch.Tensor) -> torch.Tensor:
    one = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, one, upper=False)


def _check(system: torch.Tensor) -> None:
    check_tensors(system=system)
    check_dtype("system", system, PRECISE)
    if system.ndim != 2 or system.shape[0] != system.shape[1] or not system.is_contiguous():
        raise ValueError(f"the system must be a contiguous square matrix, got shape {tuple(system.shape)}.")
