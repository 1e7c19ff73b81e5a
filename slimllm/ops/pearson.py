"""Selection of heads: Pearson similarity of the kept heads' output to the full output, and greedy exchange."""

from __future__ import annotations

import torch

from slimllm.ops.checks import PRECISE, check_dtype, check_finite, check_floating, check_integer, check_tensors
from slimllm.ops.dispatch import backend_of_call
from slimllm.ops.heads import head_covariance
from slimllm.ops.registry import Random, forced, operator

# Relative change of an fp64 sum of D numbers that another order of summation can cause; too little to exchange heads.
ROUNDING = 1e-12


def pearson_similarity(cov_with_full: torch.Tensor, variance: torch.Tensor, full_variance: torch.Tensor) -> torch.Tensor:
    """Return Σ_k |r_k| with r_k = cov(o_S, o)_k / (σ(o_S)_k σ(o)_k). k is the last dimension; constant outputs count as 0.

    Args:
        cov_with_full: cov(o_S[:, k], o[:, k]), (..., D).
        variance: var(o_S[:, k]), (..., D).
        full_variance: var(o[:, k]), (D,).

    Raises:
        ValueError: shapes or devices are inconsistent, or a number is not finite.
        TypeError: a dtype is not a floating dtype.
    """
    arguments = {"cov_with_full": cov_with_full, "variance": variance, "full_variance": full_variance}
    check_tensors(**arguments)
    check_floating(**arguments)
    if cov_with_full.shape != variance.shape or full_variance.shape != variance.shape[-1:] or not variance.ndim:
        raise ValueError(
            "cov_with_full, variance and full_variance must have shapes (..., D), (..., D) and (D,), got "
            f"{tuple(cov_with_full.shape)}, {tuple(variance.shape)} and {tuple(full_variance.shape)}."
        )
    for name, tensor in arguments.items():
        check_finite(name, tensor)  # else NaNs would count as constant outputs
    return _pearson_similarity(cov_with_full, variance, full_variance)


def _pearson_similarity(cov_with_full: torch.Tensor, variance: torch.Tensor, full_variance: torch.Tensor) -> torch.Tensor:
    scale = (variance.clamp(min=0) * full_variance.clamp(min=0)).sqrt()
    return torch.where(scale > 0, cov_with_full.abs() / scale, 0.0).sum(-1)


def head_importance(covariance: torch.Tensor) -> torch.Tensor:
    """Return the importance of every head: minus the Pearson similarity of the output without it to the full output.

    Args:
        covariance: C from `head_covariance`, (H, H, D).

    Returns:
        (H,) fp64; the lowest is removed first.

    Raises:
        ValueError: the shape is wrong, or a covariance is not finite.
        TypeError: the dtype is neither fp64 nor fp32.
    """
    _check(covariance)
    return _head_importance(covariance)


def _head_importance(covariance: torch.Tensor) -> torch.Tensor:
    check_finite("covariance", covariance)  # else NaNs would count as constant outputs
    with_full = covariance.sum(1, dtype=torch.float64)  # (H, D): cov(o_i, o)
    full_variance = with_full.sum(0)
    own = covariance.diagonal().T  # (H, D): var(o_i)
    variance = full_variance - 2 * with_full + own
    return -_pearson_similarity(full_variance - with_full, variance, full_variance)


def pearson_greedy(covariance: torch.Tensor, num_pruned: int, group_size: int = 1) -> torch.Tensor:
    """Choose the heads to keep: remove the least important ones, then raise the Pearson similarity by greedy exchange.

    For every pruned head, from the least important on, the best single exchange with a kept head is made if it raises
    the similarity of the kept heads' output to the full output by more than rounding (1e-12 of it). There is one pass, as
    published. With T_i = Σ_j C[i,j] and R_i = Σ_{j∈S} C[i,j], keeping p instead of q changes

        cov(o_S, o) by T_p - T_q   and   var(o_S) by C_pp + 2(R_p - C_pq) + C_qq - 2R_q,

    so all exchanges of one p cost O(H·D). Sums are fp64, and no exchange waits for the host.

    Args:
        covariance: C from `head_covariance`, (H, H, D), fp64 or fp32.
        num_pruned: Number of heads to remove, from 0 to H - 1 and divisible by the number of groups.
        group_size: If above 1, heads i·group_size … (i+1)·group_size - 1 form a group, every group loses the same
            number of heads, and exchanges stay within a group.

    Returns:
        Sorted int64 indices of the kept heads, on the device of `covariance`.

    Raises:
        ValueError: the shape is wrong, a covariance is not finite, or num_pruned or group_size is impossible.
        TypeError: a dtype is not one of those above.
    """
    _check(covariance)
    check_integer("num_pruned", num_pruned)
    check_integer("group_size", group_size)
    num_heads = covariance.shape[0]
    if group_size < 1 or num_heads % group_size:
        raise ValueError(f"group_size must divide the number of heads, {num_heads}, got {group_size}.")
    groups = num_heads // group_size if group_size > 1 else 1
    if not 0 <= num_pruned < num_heads or num_pruned % groups:
        evenly = f" and a multiple of {groups}, as many from every group of {group_size}" if groups > 1 else ""
        raise ValueError(
            f"num_pruned, the number of heads to remove, must be from 0 to {num_heads - 1}{evenly}, got {num_pruned}."
        )
    return _pearson_greedy(covariance.detach(), num_pruned, groups)


def _check(covariance: torch.Tensor) -> None:
    check_tensors(covariance=covariance)
    if covariance.ndim != 3 or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(f"covariance must have shape (H, H, D), got {tuple(covariance.shape)}.")
    check_dtype("covariance", covariance, PRECISE)


def _cases(random: Random, tokens: int) -> list[torch.Tensor]:
    x, weight = random(tokens, 8 * 24), random(136, 8 * 24)
    with forced("torch"):
        by_head = head_covariance(weight, x.double().T @ x.double() / len(x), 8)
    return [pearson_greedy(by_head, 4)]


@operator(
    "pearson_greedy(Tensor covariance, int num_pruned, int groups) -> Tensor",
    shape=lambda covariance, num_pruned, groups: covariance.new_empty(covariance.shape[0] - num_pruned, dtype=torch.int64),
    cases=_cases,
    kernel=True,
)
def _pearson_greedy(covariance: torch.Tensor, num_pruned: int, groups: int) -> torch.Tensor:
    num_heads = covariance.shape[0]
    group_of = torch.arange(num_heads, device=covariance.device) // (num_heads // groups)
    # Least important first. The sort is stable, to order equals like the published implementation.
    order = torch.argsort(_head_importance(covariance), stable=True)
    by_group = order[torch.argsort(group_of[order], stable=True)].view(groups, -1)
    kept = torch.ones(num_heads, dtype=torch.bool, device=covariance.device)
    kept[by_group[:, : num_pruned // groups].flatten()] = False
    pruned = order[torch.argsort(kept[order].int(), stable=True)[:num_pruned]]  # least important first, over all groups
    if backend_of_call("pearson_greedy", covariance.device) == "triton":
        from slimllm.kernels.exchange import exchange_ as kernel

        kernel(kept, covariance, pruned, num_heads // groups, ROUNDING)
    else:
        _exchange_(kept, covariance, pruned, group_of)
    return torch.argsort((~kept).int(), stable=True)[: num_heads - num_pruned]


def _exchange_(kept: torch.Tensor, covariance: torch.Tensor, pruned: torch.Tensor, group_of: torch.Tensor) -> None:
    """Run the exchange search; `kept` (H,) is updated in place. Every decision stays a tensor on the device."""
    covariance = covariance.double()
    with_full = covariance.sum(1)  # T: (H, D)
    full_variance = with_full.sum(0)
    own = covariance.diagonal().T  # (H, D)
    with_kept = (covariance * kept[None, :, None]).sum(1)  # R: (H, D)
    cov_kept, variance = (with_full * kept[:, None]).sum(0), (with_kept * kept[:, None]).sum(0)
    best = _pearson_similarity(cov_kept, variance, full_variance)
    for step in range(len(pruned)):
        p = pruned[step : step + 1]  # (1,), since indexing with a number would wait for the device
        row = covariance[p][0]
        new_cov = cov_kept + with_full[p] - with_full
        new_variance = variance + own[p] + 2 * (with_kept[p] - row) + own - 2 * with_kept
        similarity = _pearson_similarity(new_cov, new_variance, full_variance)
        similarity = similarity.masked_fill(~kept | (group_of != group_of[p]), -torch.inf)
        score, q = similarity.max(0, keepdim=True)
        better = score > best * (1 + ROUNDING)
        best = torch.where(better, score, best)
        cov_kept, variance = torch.where(better, new_cov[q][0], cov_kept), torch.where(better, new_variance[q][0], variance)
        with_kept = torch.where(better, with_kept + row - covariance[q][0], with_kept)
        kept[q] = kept[q] & ~better
        kept[p] = better
