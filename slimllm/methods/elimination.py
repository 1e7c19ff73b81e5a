"""Structured optimal brain surgeon: removal with the least output error after all remaining weights are refitted.

Removing columns R of an output projection W and refitting the others by a ridge regression about the old weights minimises

    J(Δ) = tr(Δ H Δᵀ),   H = D⁻¹ Cov(z) D⁻¹ + λI,   V = W D,   V_R + Δ_R = 0

over the change Δ of the scaled weights V. With A = H⁻¹, the least J and the updates of V and A are

    J = tr(V_R (A_RR)⁻¹ V_Rᵀ),   V ← V - V_R (A_RR)⁻¹ A_R:,   A ← A - A_:R (A_RR)⁻¹ A_R:.

The choice is greedy: the columns that cost least are removed first, and the costs of all removed columns add up to their
joint J. J includes the penalty of the ridge, so it never falls as more columns are removed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from slimllm import ops
from slimllm.errors import InputError
from slimllm.methods.ridge import RidgeSystem, has_few_tokens
from slimllm.ops.dispatch import full_precision
from slimllm.ops.elimination import LEAST
from slimllm.statistics import GramStatistics

# λ, and λ for few tokens (benchmarks/NOTES.md). Both are smaller than the recovery's. They keep columns that few tokens
# cannot tell apart from looking free to remove.
ELIMINATION_RIDGE, ELIMINATION_RIDGE_OF_FEW = 0.01, 0.3
# Channels are removed in this many blocks, or in more, so that none has more channels than the largest block. Those of a
# block are chosen one by one among twice as many candidates, so that a block costs only one large product.
BLOCKS, LARGEST_BLOCK = 16, 128
Solve = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
# Fractions of the mean diagonal, added in turn to a matrix that rounding has made indefinite.
_SHIFTS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
_ROWS = 768  # rows of A that are updated or copied at a time


@dataclass(frozen=True)
class Elimination:
    """Removed units and their costs, on the CPU.

    Attributes:
        order: The removed units, first to last, (num,) int64.
        costs: What each of them adds to J, (num,) fp64.
        alone: What each of all units would add to J alone, (all,) fp32.
    """

    order: torch.Tensor
    costs: torch.Tensor
    alone: torch.Tensor


class Surgeon:
    """The inverse A and the weights V of the remaining columns, on the solver's device of the statistics.

    Columns are scaled to unit size and the ridge bounds the condition number, so fp32 is accurate enough for choosing.
    Memory: A and V, and some of their rows. A takes the place of its system, and what remains of it that of the whole.

    Args:
        weight: W (D, F), any floating dtype.
        statistics: Statistics of its inputs, F features.
        careful: Check every factor at once, which waits for the device, and shift matrices that rounding made indefinite.
            Otherwise `failed` says at the end whether there was one.

    Attributes:
        inverse: A, (F, F) fp32; only the lower half is valid.
        weight: Vᵀ, (F, D) fp32.
    """

    def __init__(self, weight: torch.Tensor, statistics: GramStatistics, careful: bool = False) -> None:
        self._given, self._careful = (weight, statistics), careful
        ridge = ELIMINATION_RIDGE_OF_FEW if has_few_tokens(statistics) else ELIMINATION_RIDGE
        for shift in _SHIFTS:  # the diagonal is at most 1
            system = RidgeSystem(statistics, None, ridge, torch.float32, shift)
            if not bool(system.failed):
                break
        else:
            raise _ill_conditioned()
        self.inverse = system.invert()
        size = torch.where(system.scale > 0, system.scale.reciprocal(), 0.0).float()
        self.weight = weight.to(size.device).T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        self.weight.mul_(size[:, None])
        self._failures = torch.zeros((), dtype=torch.int64, device=size.device)

    def solved(self, operation: Solve, matrices: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Return the result of `ops.half_solve` or `ops.quadratic_forms` for diagonal blocks of A, (batch, n, n)."""
        result, failed = operation(matrices, right)
        if not self._careful:
            self._failures += failed.count_nonzero()
            return result
        size = matrices.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
        for shift in _SHIFTS[1:]:
            if not bool(failed.any()):
                return result
            matrices.diagonal(dim1=-2, dim2=-1).add_(shift * size)
            result, failed = operation(matrices, right)
        if bool(failed.any()):
            raise _ill_conditioned()
        return result

    def failed(self) -> bool:
        """Return whether a factor could not be computed; what was computed with it is then of no use."""
        return bool(self._failures)

    def again(self) -> Surgeon:
        """Return a careful surgeon of all columns; this one is of no use any more."""
        del self.inverse, self.weight
        return Surgeon(*self._given, careful=True)

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows of A, by index: (len(rows), F)."""
        below = torch.arange(len(self.inverse), device=rows.device) <= rows[:, None]
        return torch.where(below, self.inverse.index_select(0, rows), self.inverse.index_select(1, rows).T)

    def block(self, columns: torch.Tensor) -> torch.Tensor:
        """Return rows and columns of A, by index: (len(columns), len(columns))."""
        rows = columns[:, None]
        return self.inverse[torch.maximum(rows, columns), torch.minimum(rows, columns)]

    def remove(self, gone: torch.Tensor) -> None:
        """Remove columns and refit the others; the removed ones' entries of A and V become 0, up to rounding.

        Work: n F²/2 + n F D multiply-adds for n columns.
        """
        size = len(self.inverse)
        across = torch.cat([self.rows(gone), self.weight[gone]], 1)
        across = self.solved(ops.half_solve, self.block(gone)[None], across[None])[0]
        inverse, weight = across[:, :size], across[:, size:]
        with full_precision(self.inverse.device):
            self.weight.addmm_(inverse.T, weight, alpha=-1)
            for start in range(0, size, _ROWS):
                stop = min(start + _ROWS, size)
                self.inverse[start:stop, :stop].addmm_(inverse[:, start:stop].T, inverse[:, :stop], alpha=-1)

    def keep(self, left: torch.Tensor) -> None:
        """Drop all columns except `left`, in ascending order; the dropped ones must have been removed before."""
        self.weight = self.weight[left]
        size, numbers = len(left), self.inverse.view(-1)
        for start in range(0, size, _ROWS):  # in place: a row moves to where no later one is
            rows = self.inverse[left[start : start + _ROWS]].index_select(1, left)
            numbers[start * size : start * size + rows.numel()] = rows.view(-1)
        self.inverse = numbers[: size * size].view(size, size)


def _ill_conditioned() -> InputError:
    return InputError(
        "The activations are not finite or too ill-conditioned for the criterion obs and the allocation auto; "
        "choose other methods."
    )


def channel_costs(surgeon: Surgeon) -> torch.Tensor:
    """Compute the cost of removing each channel: ‖V_c‖² / A_cc, (F,) fp32."""
    pivots = surgeon.inverse.diagonal()
    return surgeon.weight.square().sum(1) / torch.maximum(pivots, LEAST * pivots.max())


def eliminate_channels(surgeon: Surgeon, num: int) -> Elimination:
    """Remove `num` channels.

    Work: every block updates A and V, which are made smaller whenever half of their channels are gone. For all I channels
    this takes 2/7 I³ + 2/3 I²·D multiply-adds.
    """
    names, alone = torch.arange(len(surgeon.inverse), device=surgeon.inverse.device), channel_costs(surgeon).cpu()
    there = torch.ones_like(names, dtype=torch.bool)
    block = min(max(1, len(names) // BLOCKS), LARGEST_BLOCK)
    order, costs = [names[:0]], [torch.zeros(0, dtype=torch.float64, device=names.device)]
    removed, total = 0, len(names)
    while removed < num:
        left = total - removed
        if 2 * left <= len(there):
            kept = there.nonzero()[:, 0]
            surgeon.keep(kept)
            names, there = names[kept], there[kept]
        wanted = min(block, num - removed)
        each = channel_costs(surgeon).masked_fill(~there, torch.inf)
        pool = each.topk(min(2 * wanted, left), largest=False).indices
        rows = surgeon.weight[pool]
        with full_precision(rows.device):
            products = rows @ rows.T
        chosen, found = ops.greedy_elimination(surgeon.block(pool), products, wanted)
        gone = pool[chosen]
        costs.append(found)
        order.append(names[gone])
        surgeon.remove(gone)
        there.index_fill_(0, gone, False)
        removed += wanted
    if surgeon.failed():
        return eliminate_channels(surgeon.again(), num)
    return Elimination(torch.cat(order).cpu(), torch.cat(costs).cpu(), alone)


def eliminate_heads(surgeon: Surgeon, num_units: int, num: int, num_groups: int = 1) -> Elimination:
    """Remove `num` units of equal width from every group, one unit of each group in turn.

    Args:
        surgeon: The surgeon of o_proj, with num_units · width columns.
        num_units: Number of units: KV groups with all their query heads, or single heads.
        num: Number of units to remove from each group.
        num_groups: Number of groups of adjacent units; 1: any unit may be removed.
    """
    width, device = len(surgeon.inverse) // num_units, surgeon.inverse.device
    units, alone = torch.arange(num_units, device=device), unit_costs(surgeon, num_units)
    group_of = units // (num_units // num_groups)
    order, costs = [units[:0]], [torch.zeros(0, dtype=torch.float64, device=device)]
    for _ in range(num):
        for group in range(num_groups):
            cost = unit_costs(surgeon, len(units)).masked_fill(group_of != group, torch.inf)
            least = cost.argmin()  # stays on the device
            order.append(units[least][None])
            costs.append(cost[least][None])
            surgeon.remove(least * width + torch.arange(width, device=device))
            surgeon.keep(_without(least * width, width, len(units) * width))
            left = _without(least, 1, len(units))
            units, group_of = units[left], group_of[left]
    if surgeon.failed():
        return eliminate_heads(surgeon.again(), num_units, num, num_groups)
    return Elimination(torch.cat(order).cpu(), torch.cat(costs).cpu(), alone.float().cpu())


def _without(start: torch.Tensor, count: int, total: int) -> torch.Tensor:
    """Return all indices below `total` except `count` from `start` on, without waiting for the device that has `start`."""
    others = torch.arange(total - count, device=start.device)
    return torch.where(others < start, others, others + count)


def unit_costs(surgeon: Surgeon, number: int) -> torch.Tensor:
    """Compute the cost of removing each of the remaining units: tr(V_u (A_uu)⁻¹ V_uᵀ), (number,) fp64."""
    width = len(surgeon.inverse) // number
    blocks = surgeon.inverse.view(number, width, number, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
    return surgeon.solved(ops.quadratic_forms, blocks, surgeon.weight.view(number, width, -1))
