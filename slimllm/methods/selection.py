"""From importance to sorted indices of what is kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Selection:
    """What a criterion chose.

    Attributes:
        kept: The units that stay, sorted int64 indices on the CPU.
        importance: Score of every unit, for the report: the lowest are removed first, where they are weighed one by one.
    """

    kept: torch.Tensor
    importance: torch.Tensor

    def check(self, units: int, groups: int, num_removed: int) -> None:
        """Raise ValueError unless it is a choice of `units`, of each of the groups of which `num_removed` are removed."""
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
    """Channels to keep: the least important go.

    Args:
        importance: (I,).
        num_pruned: How many to remove, from 0 to I - 1.
        keep_lowest: That many of the very least important are kept all the same, and the next ones go: what the
            authors' published implementation does (1 % of the channels) and their paper does not say.

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
    """Units of attention to keep: of every group of neighbouring ones the least important go.

    Args:
        importance: (units,).
        num_pruned: How many of each group.
        num_groups: Groups; 1 lets any unit go.

    Returns:
        Sorted int64 indices of the kept units, on the CPU.
    """
    by_group = importance.view(num_groups, -1)
    if not 0 <= num_pruned < by_group.shape[1]:
        raise ValueError(f"cannot prune {num_pruned} of {by_group.shape[1]} units.")
    kept = by_group.argsort(dim=1, stable=True)[:, num_pruned:].cpu()
    return (kept + torch.arange(num_groups)[:, None] * by_group.shape[1]).flatten().sort().values


def complement(removed: torch.Tensor, number: int) -> torch.Tensor:
    """The sorted int64 indices below `number` that are not removed, on the CPU."""
    return torch.ones(number, dtype=torch.bool).index_fill_(0, removed.cpu(), False).nonzero()[:, 0]
