"""Structured optimal brain surgeon: what goes with the least output error once all that is left has been fitted anew.

Removing columns R of an output projection W and re-fitting the others by a ridge regression about the old weights minimises

    J(Δ) = tr(Δ H Δᵀ),   H = D⁻¹ Cov(z) D⁻¹ + λI,   V = W D,   V_R + Δ_R = 0

over the change Δ of the scaled weights V. With A = H⁻¹ the least J, and what it leaves, are

    J = tr(V_R (A_RR)⁻¹ V_Rᵀ),   V ← V - V_R (A_RR)⁻¹ A_R:,   A ← A - A_:R (A_RR)⁻¹ A_R:.

Greedy: what costs least goes, and the costs of what went add up to J of all of it. J counts the ridge's penalty too, so it
never falls as more goes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from slimllm.errors import InputError
from slimllm.methods.ridge import column_scale, has_few_tokens
from slimllm.ops.dispatch import full_precision
from slimllm.statistics import GramStatistics

# λ. Smaller than that of the recovery: it keeps what few tokens do not tell apart from looking free. And where there are
# few tokens (benchmarks/NOTES.md).
ELIMINATION_RIDGE, ELIMINATION_RIDGE_OF_FEW = 0.01, 0.3
# Channels go in so many blocks, each chosen one by one among twice as many candidates: a block costs one large product.
BLOCKS = 64
_SHIFTS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.0)  # of the mean diagonal, one after the other where it takes one
_LEAST = 1e-7  # of the largest A_cc: what is less is rounding
_ROWS = 256  # of a matrix at a time, where a copy of it is made


@dataclass(frozen=True)
class Elimination:
    """What goes, first to last (num,) int64, what each adds to J (num,) fp64, and what each would add alone (all,) fp32.

    All on the CPU.
    """

    order: torch.Tensor
    costs: torch.Tensor
    alone: torch.Tensor


class Surgeon:
    """The inverse A and the weights V of what is left, where the statistics are.

    Columns are scaled to unit size and the ridge bounds the condition, so that fp32 is enough to choose by.

    Args:
        weight: W (D, F), any floating dtype.
        statistics: Statistics of its inputs, F features.

    Attributes:
        inverse: A, (F, F) fp32.
        weight: Vᵀ, (F, D) fp32.
    """

    def __init__(self, weight: torch.Tensor, statistics: GramStatistics) -> None:
        scale = column_scale(statistics.variance(), statistics.mean())
        inverse_scale = torch.where(scale > 0, scale.reciprocal(), 0.0)
        everything = torch.arange(len(scale), device=scale.device)
        system = torch.empty_like(statistics.gram)
        for rows in everything.split(_ROWS):
            system[rows] = statistics.block(rows, everything).mul_(inverse_scale[rows, None]).mul_(inverse_scale).float()
        system.diagonal().add_(ELIMINATION_RIDGE_OF_FEW if has_few_tokens(statistics) else ELIMINATION_RIDGE)
        with full_precision(system.device):
            factor = _factor(system)
            del system
            self.inverse = torch.cholesky_inverse(factor)
        del factor
        self.weight = (weight.to(scale.device).float() * scale.float()).T.contiguous()

    def remove(self, gone: torch.Tensor) -> None:
        """Fit what is left anew without some columns, whose rows and columns in A and V become 0, up to rounding."""
        with full_precision(self.inverse.device):
            factor = _factor(self.inverse[gone[:, None], gone])
            across = torch.linalg.solve_triangular(factor, self.inverse[gone], upper=False)
            weight = torch.linalg.solve_triangular(factor, self.weight[gone], upper=False)
            self.weight.addmm_(across.T, weight, alpha=-1)
            self.inverse.addmm_(across.T, across, alpha=-1)

    def keep(self, left: torch.Tensor) -> None:
        """Leave out all columns but these, of which the others have been removed."""
        self.weight = self.weight[left]
        self.inverse = self.inverse.index_select(0, left).index_select(1, left)


def _factor(matrices: torch.Tensor) -> torch.Tensor:
    """Cholesky factors of positive definite matrices; where rounding made them indefinite they are changed, in place."""
    scale = matrices.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    for shift in _SHIFTS:
        factor, failed = torch.linalg.cholesky_ex(matrices)
        if not bool(failed.any()):
            return factor
        del factor
        matrices.diagonal(dim1=-2, dim2=-1).add_(shift * scale)
    raise InputError("The activations are not finite or too ill-conditioned for the criterion obs; take another one.")


def channel_costs(surgeon: Surgeon) -> torch.Tensor:
    """What each channel would cost: ‖V_c‖² / A_cc, (F,) fp32."""
    pivots = surgeon.inverse.diagonal()
    return surgeon.weight.square().sum(1) / pivots.clamp(min=_LEAST * float(pivots.max()))


def eliminate_channels(surgeon: Surgeon, num: int) -> Elimination:
    """Let `num` channels go.

    Work: A and V, a block at a time, of what was left when they were made smaller last, which is when half of that is gone:
    4/7 I³ + 2/3 I²·D multiply-adds for all I channels.
    """
    names, alone = torch.arange(len(surgeon.inverse), device=surgeon.inverse.device), channel_costs(surgeon).cpu()
    there = torch.ones_like(names, dtype=torch.bool)
    block = max(1, len(names) // BLOCKS)
    order: list[torch.Tensor] = []
    costs: list[float] = []
    while len(costs) < num:
        left = int(there.sum())
        if 2 * left <= len(there):
            kept = there.nonzero()[:, 0]
            surgeon.keep(kept)
            names, there = names[kept], there[kept]
        wanted = min(block, num - len(costs))
        each = channel_costs(surgeon).masked_fill(~there, torch.inf)
        pool = each.topk(min(2 * wanted, left), largest=False).indices
        rows = surgeon.weight[pool]
        with full_precision(rows.device):
            products = rows @ rows.T
        chosen, found = _one_by_one(surgeon.inverse[pool[:, None], pool], products, wanted)
        gone = pool[chosen.to(pool.device)]
        costs += found
        order.append(names[gone])
        surgeon.remove(gone)
        there[gone] = False
    gone_names = torch.cat(order) if order else names[:0]
    return Elimination(gone_names.cpu(), torch.tensor(costs, dtype=torch.float64), alone)


def _one_by_one(inverse: torch.Tensor, products: torch.Tensor, num: int) -> tuple[torch.Tensor, list[float]]:
    """The greedy choice among some channels, from their parts of A and of V Vᵀ: positions, and costs."""
    a, k = inverse.double().cpu().numpy(), products.double().cpu().numpy()
    gone, least = np.zeros(len(a), dtype=bool), _LEAST * a.diagonal().max()
    chosen, costs = [], []
    for _ in range(num):
        pivots = np.maximum(a.diagonal(), least)
        score = np.where(gone, np.inf, k.diagonal() / pivots)
        c = int(score.argmin())
        chosen.append(c)
        costs.append(max(0.0, float(score[c])))
        gone[c] = True
        part, row = a[c] / pivots[c], k[c].copy()
        shifted = row - part * (row[c] / 2)
        k -= part[:, None] * shifted + shifted[:, None] * part
        a -= part[:, None] * a[c]
    return torch.tensor(chosen), costs


def eliminate_heads(surgeon: Surgeon, num_units: int, num: int, num_groups: int = 1) -> Elimination:
    """Let `num` units of as many columns each go, of every one of the groups that they form, in turn.

    Args:
        surgeon: The surgeon of o_proj, (num_units · width) columns.
        num_units: Units: KV groups with all their query heads, or single heads.
        num: How many of each group.
        num_groups: Groups of neighbouring units; 1 lets any unit go.
    """
    width = len(surgeon.inverse) // num_units
    units, order, costs, alone = torch.arange(num_units), [], [], unit_costs(surgeon, num_units).cpu()
    group_of = torch.arange(num_units) // (num_units // num_groups)
    for _ in range(num):
        for group in range(num_groups):
            cost = unit_costs(surgeon, len(units)).double().cpu()
            cost[group_of != group] = torch.inf
            least = int(cost.argmin())
            order.append(int(units[least]))
            costs.append(float(cost[least]))
            columns = torch.arange(len(surgeon.inverse), device=surgeon.inverse.device)
            gone = columns // width == least
            surgeon.remove(columns[gone])
            surgeon.keep(columns[~gone])
            left = torch.arange(len(units)) != least
            units, group_of = units[left], group_of[left]
    return Elimination(torch.tensor(order, dtype=torch.int64), torch.tensor(costs, dtype=torch.float64), alone)


def unit_costs(surgeon: Surgeon, number: int) -> torch.Tensor:
    """What each of the units that are left would cost: tr(V_u (A_uu)⁻¹ V_uᵀ), (number,) fp32."""
    width = len(surgeon.inverse) // number
    blocks = surgeon.inverse.view(number, width, number, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    with full_precision(blocks.device):
        factor = _factor(blocks.contiguous())
        solved = torch.linalg.solve_triangular(factor, surgeon.weight.view(number, width, -1), upper=False)
    return solved.square().sum((1, 2))
