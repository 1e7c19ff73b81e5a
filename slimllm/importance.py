"""Importance of heads, channels and layers: pure functions of the statistics (SlimLLM, arXiv 2505.22689)."""

from __future__ import annotations

import torch


def head_covariance(weight: torch.Tensor, covariance: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Covariances of the heads' contributions to the attention output, without the contributions themselves.

    With o_i = X_i W_iᵀ the output of head i:

        C[i, j, k] = cov(o_i[:, k], o_j[:, k]) = W_i[k, :] Cov(X)_ij W_j[k, :]ᵀ.

    Args:
        weight: o_proj.weight (D, H·d), torch layout.
        covariance: Cov(X) of the inputs of o_proj, (H·d, H·d) fp64.
        num_heads: H, the number of units; with `kv-group` a unit is a KV group and d its query heads' width together.

    Returns:
        C, (H, H, D) fp64. Work: 2·D·(H·d)² multiply-adds, whatever the number of tokens.
    """
    if weight.ndim != 2 or weight.shape[1] % num_heads or covariance.shape != (weight.shape[1],) * 2:
        raise ValueError(
            f"weight must be (D, H·d) with H={num_heads} and covariance (H·d, H·d), "
            f"got {tuple(weight.shape)} and {tuple(covariance.shape)}."
        )
    out_features, in_features = weight.shape
    weight = weight.double()
    by_head = weight.view(out_features, num_heads, -1)  # (D, H, d)
    result = weight.new_empty(num_heads, num_heads, out_features)
    for i, rows in enumerate(covariance.view(num_heads, -1, in_features)):  # Cov(X)_i: (d, H·d)
        projected = (by_head[:, i] @ rows).view_as(by_head)  # (D, H, d): W_i Cov_ij for every j
        result[i] = (projected * by_head).sum(-1).T
    return result


def pearson_similarity(cov_with_full: torch.Tensor, variance: torch.Tensor, full_variance: torch.Tensor) -> torch.Tensor:
    """Σ_k |r_k| with r_k = cov(o_S, o)_k / (σ(o_S)_k σ(o)_k); the last dimension is k, a constant output counts 0.

    Args:
        cov_with_full: cov(o_S[:, k], o[:, k]), (..., D).
        variance: var(o_S[:, k]), (..., D).
        full_variance: var(o[:, k]), (D,).
    """
    scale = (variance.clamp(min=0) * full_variance.clamp(min=0)).sqrt()
    return torch.where(scale > 0, cov_with_full.abs() / scale, 0.0).sum(-1)


def head_importance(covariance: torch.Tensor) -> torch.Tensor:
    """Importance of every head: minus the Pearson similarity of the output without it to the output.

    Args:
        covariance: C from `head_covariance`, (H, H, D).

    Returns:
        (H,) fp64; the lowest goes first.
    """
    with_full = covariance.sum(1)  # (H, D): cov(o_i, o)
    full_variance = with_full.sum(0)
    own = covariance.diagonal().T  # (H, D): var(o_i)
    variance = full_variance - 2 * with_full + own
    return -pearson_similarity(full_variance - with_full, variance, full_variance)


def feature_space_importance(
    down_weight: torch.Tensor, output_covariance: torch.Tensor, channel_norms: torch.Tensor
) -> torch.Tensor:
    """I_down(c) = ‖Z[:,c]‖₂ · ‖s ∘ (Vᵀ W_d[:,c])‖₂, with Cov(y) = V Λ Vᵀ and s_j = sigmoid(|λ_j| / mean|λ|).

    Args:
        down_weight: down_proj.weight (D, I).
        output_covariance: Cov(y) of the outputs of down_proj, (D, D) fp64.
        channel_norms: ‖Z[:,c]‖₂, (I,).

    Returns:
        (I,) fp64.
    """
    eigenvalues, vectors = torch.linalg.eigh(output_covariance)
    eigenvalues = eigenvalues.abs()
    mean = eigenvalues.mean()
    scale = torch.sigmoid(eigenvalues / mean) if mean > 0 else torch.full_like(eigenvalues, 0.5)
    # In fp32 at least: half precision changes which channels are kept.
    features = (vectors * scale).T.float() @ down_weight.float()  # (D, I)
    return channel_norms * torch.linalg.vector_norm(features, dim=0, dtype=torch.float64)


def input_importance(weight: torch.Tensor, input_norms: torch.Tensor) -> torch.Tensor:
    """I_gate(c) or I_up(c) = ‖W[c,:] ∘ n‖₂ with n_j = ‖x[:,j]‖₂.

    Args:
        weight: gate_proj.weight or up_proj.weight (I, D).
        input_norms: n, (D,).

    Returns:
        (I,) fp64.
    """
    squares = weight.float().square() @ input_norms.square().float()
    return squares.double().sqrt()


def layer_similarity(hidden_in: torch.Tensor, hidden_out: torch.Tensor) -> torch.Tensor:
    """Σ_t cos(h_in[t], h_out[t]) over the tokens of a batch; its mean over all tokens is the layer's c.

    Args:
        hidden_in, hidden_out: (..., D), the residual stream before and behind a decoder layer.

    Returns:
        fp64 scalar.
    """
    hidden_in, hidden_out = hidden_in.float(), hidden_out.float()
    norms = torch.linalg.vector_norm(hidden_in, dim=-1) * torch.linalg.vector_norm(hidden_out, dim=-1)
    return (torch.linalg.vecdot(hidden_in, hidden_out) / norms.clamp(min=1e-30)).sum(dtype=torch.float64)
