"""From importance to sorted keep indices: which heads and which channels of one layer stay."""

from __future__ import annotations

import torch

from slimllm.importance import head_importance, pearson_similarity


def select_heads(covariance: torch.Tensor, num_pruned: int, group_size: int = 1) -> torch.Tensor:
    """Heads to keep: the least important go, then a greedy exchange search raises the Pearson similarity.

    For every pruned head, from the least important on, the best single exchange with a kept head is taken if it
    strictly raises the similarity of the kept heads' output to the full output. One pass, as published. With
    T_i = Σ_j C[i,j] and R_i = Σ_{j∈S} C[i,j], putting p in the place of q changes

        cov(o_S, o) by T_p - T_q   and   var(o_S) by C_pp + 2(R_p - C_pq) + C_qq - 2R_q,

    so all exchanges of one p cost O(H·D).

    Args:
        covariance: C from `head_covariance`, (H, H, D) fp64.
        num_pruned: How many heads to remove, from 0 to H - 1 and divisible by the number of groups.
        group_size: With more than 1, heads i·group_size … (i+1)·group_size - 1 form a group, every group loses the
            same number of heads, and exchanges stay inside a group.

    Returns:
        Sorted int64 indices of the kept heads, on the CPU.
    """
    num_heads = covariance.shape[0]
    groups = num_heads // group_size if group_size > 1 else 1
    if not 0 <= num_pruned < num_heads or num_heads % groups or num_pruned % groups:
        raise ValueError(f"cannot prune {num_pruned} of {num_heads} heads in {groups} groups evenly.")
    # The reference sorts by similarity, descending; a stable sort of the importance gives the same order.
    order = torch.argsort(head_importance(covariance), stable=True)
    group_of = torch.arange(num_heads, device=covariance.device) // (num_heads // groups)
    pruned = torch.cat([order[group_of[order] == g][: num_pruned // groups] for g in range(groups)])
    pruned = order[torch.isin(order, pruned)]  # least important first, over all groups
    kept = torch.ones(num_heads, dtype=torch.bool, device=covariance.device)
    kept[pruned] = False

    with_full = covariance.sum(1)  # T: (H, D)
    full_variance = with_full.sum(0)
    own = covariance.diagonal().T  # (H, D)
    with_kept = covariance[:, kept].sum(1)  # R: (H, D)
    cov_kept, variance = with_full[kept].sum(0), with_kept[kept].sum(0)
    best = pearson_similarity(cov_kept, variance, full_variance)
    for p in pruned.tolist():
        new_cov = cov_kept + with_full[p] - with_full
        new_variance = variance + own[p] + 2 * (with_kept[p] - covariance[p]) + own - 2 * with_kept
        similarity = pearson_similarity(new_cov, new_variance, full_variance)
        similarity[~kept | (group_of != group_of[p])] = -torch.inf
        q = int(similarity.argmax())
        if similarity[q] > best:
            best, cov_kept, variance = similarity[q], new_cov[q], new_variance[q]
            with_kept = with_kept + covariance[p] - covariance[q]
            kept[p], kept[q] = True, False
    return kept.nonzero().flatten().cpu()


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


def head_columns(heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Column (or row) indices of the given heads: (len(heads) · head_dim,) int64."""
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()
