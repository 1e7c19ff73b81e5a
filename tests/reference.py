"""The authors' algorithm, written plainly in fp64 on raw activations, as the reference for the engine.

It works on the (num_tokens, D, H) tensor of per-head outputs, sums outputs again for every exchange, and uses a
non-symmetric eigendecomposition and one polynomial fit per output dimension. It shares no code with slimllm.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch


def head_outputs(x: torch.Tensor, weight: torch.Tensor, units: int) -> torch.Tensor:
    """Return o_i = X_i W_iᵀ for every unit, (num_tokens, D, units)."""
    blocks = x.double().view(len(x), units, -1)
    weights = weight.double().view(weight.shape[0], units, -1)
    return torch.einsum("nhd,khd->nkh", blocks, weights)


def similarity(part: torch.Tensor, full: torch.Tensor) -> float:
    """Return Σ_k |r_k| of two outputs (num_tokens, D), with r_k the correlation in dimension k."""
    part, full = part - part.mean(0), full - full.mean(0)
    covariance = (part * full).mean(0)
    sigma = part.square().mean(0).sqrt() * full.square().mean(0).sqrt()
    return float((covariance / sigma).abs().nan_to_num(0.0).sum())


def choose_heads(outputs: torch.Tensor, num_pruned: int, group_size: int = 1) -> list[int]:
    """Return the kept units: remove the least important ones, then do one pass of greedy exchanges."""
    full = outputs.sum(-1)
    num_units = outputs.shape[-1]
    groups = num_units // group_size if group_size > 1 else 1
    group_of = [unit // (num_units // groups) for unit in range(num_units)]
    without = [similarity(full - outputs[..., unit], full) for unit in range(num_units)]
    order = sorted(range(num_units), key=lambda unit: -without[unit])
    pruned: list[int] = []
    for unit in order:
        if sum(group_of[p] == group_of[unit] for p in pruned) < num_pruned // groups:
            pruned.append(unit)
    kept = [unit for unit in order if unit not in pruned]
    best = similarity(outputs[..., kept].sum(-1), full)
    for candidate in pruned:
        improved = kept
        for position, unit in enumerate(kept):
            if group_of[unit] != group_of[candidate]:
                continue
            trial = [*kept[:position], candidate, *kept[position + 1 :]]
            value = similarity(outputs[..., trial].sum(-1), full)
            if value > best:
                best, improved = value, trial
        kept = improved
    return sorted(kept)


def channel_importance(
    x: torch.Tensor, inner: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Return I_gate + I_up + I_down of every channel, from x (N, D), Z (N, I) and the weights."""
    x, inner, gate, up, down = (t.double() for t in (x, inner, gate, up, down))
    y = inner @ down.T
    y = y - y.mean(0)
    # The authors call eig. For a singular matrix (fewer tokens than dimensions) its vectors are not orthogonal.
    decompose = np.linalg.eig if len(y) > y.shape[1] else np.linalg.eigh
    eigenvalues, vectors = decompose((y.T @ y).numpy())
    scale = torch.from_numpy(np.abs(eigenvalues))
    scale = torch.sigmoid(scale / scale.mean())
    features = (torch.from_numpy(np.real(vectors)).T @ down) * scale[:, None]  # (D, I)
    from_input = (gate * x.norm(dim=0)).norm(dim=1) + (up * x.norm(dim=0)).norm(dim=1)
    return from_input + (features * inner.norm(dim=0)).norm(dim=0)


def choose_channels(importance: torch.Tensor, num_pruned: int, keep_lowest: int = 0) -> list[int]:
    order = importance.argsort().tolist()
    return sorted(order[:keep_lowest] + order[keep_lowest + num_pruned :])


def fit(y: torch.Tensor, y_hat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return slope and intercept of y on ŷ, dimension by dimension."""
    pairs = [np.polyfit(y_hat[:, k].double().numpy(), y[:, k].double().numpy(), 1) for k in range(y.shape[1])]
    a, b = np.array(pairs).T
    return torch.from_numpy(a), torch.from_numpy(b)


def columns(units: list[int], size: int) -> list[int]:
    return [unit * size + i for unit in units for i in range(size)]


@torch.no_grad()
def prune(
    model: Any,
    token_ids: torch.Tensor,
    removals: list[Any],
    head_unit: str,
    keep_lowest: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> Any:
    """Prune a LLaMA layer by layer, with the numbers of units and channels in `removals`.

    Everything that a forward pass computes, including outputs of the projections, is in `dtype`; the rest is in fp64.

    Returns:
        For each layer: the kept heads, KV heads and channels, (a, b, max|y|) of both sub-layers, and the layer's output
        (windows, tokens, D).
    """
    model = copy.deepcopy(model).to(dtype).eval()
    hidden = model.model.embed_tokens(token_ids)
    position_ids = torch.arange(token_ids.shape[1])[None]
    rotary = model.model.rotary_emb(hidden, position_ids)
    result = []
    for layer, removal in zip(model.model.layers, removals, strict=True):
        entry: dict[str, Any] = {}
        attention, mlp = layer.self_attn, layer.mlp
        head_dim = attention.head_dim
        num_kv = attention.k_proj.out_features // head_dim
        group = attention.q_proj.out_features // attention.k_proj.out_features
        inputs: dict[str, torch.Tensor] = {}
        hook = attention.o_proj.register_forward_pre_hook(lambda m, a, s=inputs: s.update(x=a[0].flatten(0, 1)))
        dense = attention(layer.input_layernorm(hidden), position_embeddings=rotary, attention_mask=None)[0]
        hook.remove()
        if removal.units:
            weight, raw = attention.o_proj.weight, inputs["x"]
            if head_unit == "kv-group":
                kept = choose_heads(head_outputs(raw, weight, num_kv), removal.units)
                heads, kv_heads = columns(kept, group), kept
            else:
                outputs = head_outputs(raw, weight, num_kv * group)
                heads, kv_heads = choose_heads(outputs, removal.units * num_kv, group), list(range(num_kv))
            cols = columns(heads, head_dim)
            y, y_hat = raw @ weight.T, raw[:, cols] @ weight[:, cols].T
            a, b = fit(y, y_hat)
            bias = attention.o_proj.bias if attention.o_proj.bias is not None else 0.0
            hidden = hidden + (a * y_hat + b + bias).view_as(hidden).to(dtype)
            entry |= {"kept_heads": heads, "kept_kv_heads": kv_heads, "attention_fit": (a, b, y.abs().max())}
        else:
            hidden = hidden + dense
        x = layer.post_attention_layernorm(hidden).flatten(0, 1)
        inner = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        if removal.channels:
            importance = channel_importance(x, inner, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
            kept = choose_channels(importance, removal.channels, round(keep_lowest * len(importance)))
            weight = mlp.down_proj.weight
            y, y_hat = inner @ weight.T, inner[:, kept] @ weight[:, kept].T
            a, b = fit(y, y_hat)
            bias = mlp.down_proj.bias if mlp.down_proj.bias is not None else 0.0
            hidden = hidden + (a * y_hat + b + bias).view_as(hidden).to(dtype)
            entry |= {"kept_channels": kept, "ffn_fit": (a, b, y.abs().max())}
        else:
            hidden = hidden + mlp.down_proj(inner).view_as(hidden)
        entry["output"] = hidden.clone()
        result.append(entry)
    return result


def plain_perplexity(model: Any, windows: torch.Tensor) -> float:
    total, count = 0.0, 0
    for window in windows:
        with torch.no_grad():
            scores = torch.log_softmax(model(window[None]).logits[0].double(), -1)
        total -= float(scores[:-1].gather(1, window[1:, None]).sum())
        count += len(window) - 1
    return math.exp(total / count)
