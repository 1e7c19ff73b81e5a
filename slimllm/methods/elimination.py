"""Structured optimal brain surgeon: removal with the least output error after all remaining weights are refitted.

Removing columns R of an output projection W and refitting the others by a ridge regression about the old weights minimises

    J(Δ) = tr(Δ H Δᵀ),   H = D⁻¹ Cov(z) D⁻¹ + λI,   V = W D,   V_R + Δ_R = 0

over the change Δ of the scaled weights V. With A = H⁻¹, the least J and the updates of V and A are

    J = tr(V_R (A_RR)⁻¹ V_Rᵀ),   V ← V - V_R (A_RR)⁻¹ A_R:,   A ← A - A_:R (A_RR)⁻¹ A_R:.

The choice is greedy: the columns that cost least are removed first, and the costs of all removed columns add up to their
joint J. J includes the penalty of the ridge, so it never falls as more columns are removed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slimllm import ops
from slimllm.methods.surgeon import Surgeon
from slimllm.ops.elimination import LEAST

# Channels are removed in this many blocks, or in more, so that none has more channels than the largest block. Those of a
# block are chosen one by one among twice as many candidates, so that a block costs only one large product.
BLOCKS, LARGEST_BLOCK = 16, 128


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


def channel_costs(surgeon: Surgeon) -> torch.Tensor:
    """Compute the cost of removing each channel: ‖V_c‖² / A_cc, (F,) fp32."""
    pivots = surgeon.pivots()
    return surgeon.squares() / torch.maximum(pivots, LEAST * pivots.max())


def eliminate_channels(surgeon: Surgeon, num: int) -> Elimination:
    """Remove `num` channels.

    Work: every block updates A and V, which are made smaller whenever half of their channels are gone. For all I channels
    this takes 2/7 I³ + 2/3 I²·D multiply-adds.
    """
    names, alone = torch.arange(len(surgeon.weight), device=surgeon.weight.device), channel_costs(surgeon).cpu()
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
        pool = surgeon.agreed(each.topk(min(2 * wanted, left), largest=False).indices)
        chosen, found = ops.greedy_elimination(surgeon.block(pool), surgeon.products(pool), wanted)
        gone = pool[surgeon.agreed(chosen)]
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
        surgeon: The surgeon of o_proj, with num_units · width columns; not a shared one.
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
