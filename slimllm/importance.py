"""Importance of heads, channels and layers: pure functions of the statistics (SlimLLM, arXiv 2505.22689)."""

from __future__ import annotations

import math

import torch

from slimllm import ops


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
    down_weight: torch.Tensor, output_covariance: torch.Tensor, channel_norms: torch.Tensor, method: str | None = None
) -> torch.Tensor:
    """I_down(c) = ‖Z[:,c]‖₂ · ‖s ∘ (Vᵀ W_d[:,c])‖₂, with Cov(y) = V Λ Vᵀ and s_j = sigmoid(|λ_j| / mean|λ|).

    `function` needs no eigenvectors: the second factor is the norm of a column of (I + exp(-C/λ̄))⁻¹ W_d, a function of
    the symmetric matrix C = Cov(y). It is computed in fp32 by 11 to 16 products and one Cholesky solve, about
    2·D²·(13·D + 2·I) operations, and agrees with `eigh` (fp64, 9·D³ operations that use a machine badly) to 1e-6.

    Args:
        down_weight: down_proj.weight (D, I).
        output_covariance: C, of the outputs of down_proj, (D, D) fp64, positive semidefinite up to rounding.
        channel_norms: ‖Z[:,c]‖₂, (I,).
        method: `function`, or `eigh`, the definition itself. None: `eigh` on a CPU, where LAPACK is the faster of the
            two (1.4 to 1.8 times at D = 576 and 2048), and `function` on a GPU, by its count of operations.

    Returns:
        (I,) fp64.

    Raises:
        ValueError: shapes do not fit together, or the method is unknown.
    """
    out_features, channels = down_weight.shape
    if output_covariance.shape != (out_features, out_features) or channel_norms.shape != (channels,):
        raise ValueError(
            "down_weight, output_covariance and channel_norms must have shapes (D, I), (D, D) and (I,), "
            f"got {tuple(down_weight.shape)}, {tuple(output_covariance.shape)} and {tuple(channel_norms.shape)}."
        )
    method = method or ("eigh" if output_covariance.device.type == "cpu" else "function")
    if method not in ("function", "eigh"):
        raise ValueError(f"method must be function or eigh, got {method!r}.")
    # In fp32 at least: half precision changes which channels are kept.
    weight = down_weight.float()
    mean = output_covariance.diagonal().mean()  # of the eigenvalues
    if not mean > 0:
        features = weight / 2
    elif method == "eigh":
        eigenvalues, vectors = torch.linalg.eigh(output_covariance)
        eigenvalues = eigenvalues.abs()
        features = (vectors * torch.sigmoid(eigenvalues / eigenvalues.mean())).T.float() @ weight
    else:
        features = _sigmoid_product((output_covariance / mean).float(), weight)
    return channel_norms * torch.linalg.vector_norm(features, dim=0, dtype=torch.float64)


def _sigmoid_product(matrix: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(I + exp(-M))⁻¹ W for a symmetric positive semidefinite M (D, D) fp32.

    With A = -M/2ᵏ of norm at most 1/4, expm1(A) by its Taylor series to degree 6 (in A and A³: 3 products; the next
    term is 1e-8), squared k times as F ← 2F + F²; expm1 rather than exp keeps the small eigenvalues' digits. 2I + F
    has condition 2 at most.
    """
    bound = torch.minimum(torch.linalg.matrix_norm(matrix, torch.inf), torch.linalg.matrix_norm(matrix))
    squarings = max(0, math.ceil(math.log2(4 * float(bound)))) if bound > 0 else 0
    with ops.full_precision():
        a = matrix * -(0.5**squarings)
        square = a @ a
        cube = a @ square
        tail = a / 24 + square / 120 + cube / 720
        tail.diagonal().add_(1 / 6)
        expm1 = a + square / 2 + cube @ tail
        for _ in range(squarings):
            expm1 = torch.addmm(expm1, expm1, expm1, beta=2)
            expm1 = (expm1 + expm1.T) / 2
        expm1.diagonal().add_(2)
        return torch.cholesky_solve(weight, torch.linalg.cholesky(expm1))


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
