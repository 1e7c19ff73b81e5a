"""Selection of units: from importance to sorted indices of the kept units."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Selection:
    """The choice of a criterion.

    Attributes:
        kept: The units that stay, sorted int64 indices on the CPU.
        importance: Score of every unit, for the report; the lowest are removed first if units are scored one by one.
    """

    kept: torch.Tensor
    importance: torch.Tensor

    def check(self, units: int, groups: int, num_removed: int) -> None:
        """Raise ValueError unless this is a valid choice among `units`, with `num_removed` removed from each group."""
        kept, importance = self.kept, self.importance
        if kept.dtype != torch.int64 or kept.ndim != 1 or kept.device.type != "cpu":
            raise ValueError(
                f"kept must be a tensor of int64 indices on the CPU, got {kept.dtype} {tuple(kept.shape)} on {kept.device}."
            )
        if len(kept) and (int(kept.min()) < 0 or int(kept.max()) >= units or not bool((kept.diff() > 0).all())):
            raise ValueError(f"kept must be ascending indices below {units}, each once, got {kept.tolist()[:20]}.")
        per_group, left = units // groups, units // groups - num_removed
        found = torch.bincount(kept // per_group, minlength=groups)
        if not bool((found == left).all()):
            raise ValueError(
                f"kept must have {left} of the {per_group} units of every group, got {found.tolist()[:20]} of the groups."
            )
        if importance.shape != (units,) or not bool(importance.isfinite().all()):
            what = "numbers that are not finite" if importance.shape == (units,) else f"shape {tuple(importance.shape)}"
            raise ValueError(f"importance must be {units} finite numbers, one for each unit, got {what}.")


def select_channels(importance: torch.Tensor, num_pruned: int, keep_lowest: int = 0) -> torch.Tensor:
    """Select the channels to keep; the least important are removed.

    Args:
        importance: (I,).
        num_pruned: Number of channels to remove, from 0 to I - 1.
        keep_lowest: Number of the least important channels that are kept nevertheless; the next ones are removed. The
            authors' published implementation does this (1 % of the channels); their paper does not mention it.

    Returns:
        Sorted int64 indices of the kept channels, on the CPU.
    """
    num_channels = importance.shape[0]
    if not 0 <= num_pruned < num_channels or keep_lowest < 0:
        raise ValueError(f"cannot prune {num_pruned} of {num_channels} channels and keep the lowest {keep_lowest}.")
    keep_lowest = min(keep_lowest, num_channels - num_pruned)
    order = torch.argsort(importance, stable=True)
    return torch.cat([order[:keep_lowest], order[keep_lowest + num_pruned :]]).sort().values.cpu()


def select_units(importance: torch.Tensor, num_pruned: int, num_groups: int = 1) -> torch.Tensor:
    """Select the units of attention to keep; the least important are removed from every group of adjacent units.

    Args:
        importance: (units,).
        num_pruned: Number of units to remove from each group.
        num_groups: Number of groups; 1: any unit may be removed.

    Returns:
        Sorted int64 indices of the kept units, on the CPU.
    """
    by_group = importance.view(num_groups, -1)
    if not 0 <= num_pruned < by_group.shape[1]:
        raise ValueError(f"cannot prune {num_pruned} of {by_group.shape[1]} units.")
    kept = by_group.argsort(dim=1, stable=True)[:, num_pruned:].cpu()
    return (kept + torch.arange(num_groups)[:, None] * by_group.shape[1]).flatten().sort().values


def complement(removed: torch.Tensor, number: int) -> torch.Tensor:
    """Return the sorted int64 indices below `number` that are not removed, on the CPU."""
    return torch.ones(number, dtype=torch.bool).index_fill_(0, removed.cpu(), False).nonzero()[:, 0]
