"""Baseline: SlimLLM step by step as in its description, on the activations of all tokens.

As in the description and the published code, nothing is optimised. Every head's whole output is computed, every exchange of
heads is tried by adding up outputs, the output's scatter matrix is decomposed by a routine that ignores its symmetry, and
each output dimension is regressed separately. Runs on any device; the general eigendecomposition and the polynomial fit are
NumPy's, on the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def head_outputs(x: torch.Tensor, weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Compute o_i = X_i W_iᵀ of every head: (H, num_tokens, D)."""
    width = weight.shape[1] // num_heads
    return torch.stack(
        [x[:, i * width : (i + 1) * width] @ weight[:, i * width : (i + 1) * width].T for i in range(num_heads)]
    )


def similarity(part: torch.Tensor, full: torch.Tensor) -> float:
    """Return Σ_k |r_k|, with Pearson's r of two outputs (num_tokens, D)."""
    part, full = part - part.mean(0), full - full.mean(0)
    sizes = part.square().sum(0).sqrt() * full.square().sum(0).sqrt()
    return float(((part * full).sum(0) / sizes).nan_to_num(0.0).abs().sum())


def choose_heads(x: torch.Tensor, weight: torch.Tensor, num_heads: int, num_pruned: int) -> list[int]:
    """Choose the heads to keep: remove the least important ones, then try each of them in every kept head's place."""
    outputs = head_outputs(x, weight, num_heads)
    full = outputs.sum(0)
    without = [similarity(full - outputs[i], full) for i in range(num_heads)]
    order = sorted(range(num_heads), key=lambda i: -without[i])
    pruned, kept = order[:num_pruned], order[num_pruned:]
    best = similarity(outputs[kept].sum(0), full)
    for candidate in pruned:
        improved = kept
        for position in range(len(kept)):
            trial = [*kept[:position], candidate, *kept[position + 1 :]]
            value = similarity(outputs[trial].sum(0), full)
            if value > best:
                best, improved = value, trial
        kept = improved
    return sorted(kept)


def choose_channels(
    x: torch.Tensor, z: torch.Tensor, y: torch.Tensor, weights: dict[str, torch.Tensor], num_pruned: int
) -> list[int]:
    """Choose the channels to keep, from the FFN's inputs x (N, D), the channels z (N, I) and its outputs y (N, D)."""
    centered = y - y.mean(0)
    values, vectors = np.linalg.eig((centered.T @ centered).double().cpu().numpy())
    strength = np.abs(np.real(values))
    scale = torch.from_numpy(1 / (1 + np.exp(-strength / strength.mean()))).to(y)
    features = (torch.from_numpy(np.real(vectors)).to(y).T @ weights["down"]) * scale[:, None]
    importance = (features * z.norm(dim=0)).norm(dim=0)
    for name in ("gate", "up"):
        importance = importance + (weights[name] * x.norm(dim=0)).norm(dim=1)
    return sorted(importance.argsort()[num_pruned:].tolist())


def regress(y: torch.Tensor, y_hat: torch.Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Fit slope and intercept of every dense output dimension on the pruned one, one polynomial fit each."""
    left, right = y.double().cpu().numpy(), y_hat.double().cpu().numpy()
    fits = np.array([np.polyfit(right[:, k], left[:, k], 1) for k in range(left.shape[1])])
    return fits[:, 0], fits[:, 1]


def prune_layer(
    attention: tuple[torch.Tensor, torch.Tensor],
    ffn: tuple[torch.Tensor, ...],
    weights: dict[str, torch.Tensor],
    num_heads: int,
    pruned_heads: int,
    pruned_channels: int,
) -> tuple[list[int], list[int]]:
    """Do everything after a layer's forward pass: choose heads and channels, and fit both regressions.

    Args:
        attention: Inputs of o_proj (N, H·d) and the attention's output (N, D).
        ffn: Inputs of the FFN (N, D), channels (N, I) and outputs (N, D).
        weights: o, gate, up and down, torch layout.
        num_heads, pruned_heads, pruned_channels: Number of heads, and numbers of heads and channels to remove.

    Returns:
        The kept heads and the kept channels.
    """
    inner, output = attention
    heads = choose_heads(inner, weights["o"], num_heads, pruned_heads)
    width = weights["o"].shape[1] // num_heads
    columns = [head * width + i for head in heads for i in range(width)]
    regress(output, inner[:, columns] @ weights["o"][:, columns].T)
    x, z, y = ffn
    channels = choose_channels(x, z, y, weights, pruned_channels)
    regress(y, z[:, channels] @ weights["down"][:, channels].T)
    return heads, channels
