"""Numbers of single tokens: their weights in the statistics, and how similar a layer leaves them."""

from __future__ import annotations

import torch

from slimllm import ops

_EPSILON = 1e-6  # as in the norms: a token that is zero everywhere has a weight, too


def token_weights(
    hidden: torch.Tensor, added: torch.Tensor, output: torch.Tensor | None = None, centered: bool = False
) -> torch.Tensor:
    """1 / mean square of the residual stream after a sub-layer, by which the next norm divides a token's errors.

    Args:
        hidden: The residual stream before it, (..., D).
        added: What it adds, (num_tokens, D).
        output: What it puts out, if that is not it because a norm lies between, which divides errors of the output, of
            which the statistics are, by its root mean square; what the norm multiplies by is `Layer.gain`.
        centered: The norm is a LayerNorm, which divides by the variance over the dimensions.

    Returns:
        (num_tokens,) fp32.
    """
    after = hidden.flatten(0, -2).float() + added
    if centered:
        after -= after.mean(-1, keepdim=True)
    weights = 1 / (after.square().mean(-1) + _EPSILON)
    if output is not None:
        weights /= output.float().square().mean(-1) + _EPSILON
    return weights


def layer_similarity(hidden_in: torch.Tensor, hidden_out: torch.Tensor) -> torch.Tensor:
    """Σ_t cos(h_in[t], h_out[t]) over the tokens of a batch; its mean over all tokens is the layer's c.

    Args:
        hidden_in, hidden_out: (..., D), the residual stream before and after a decoder layer.

    Returns:
        fp64 scalar.
    """
    streams = (hidden_in.flatten(0, -2), hidden_out.flatten(0, -2))
    if hidden_in.dtype == torch.float64:
        streams = (streams[0].float(), streams[1].float())
    return ops.token_cosine(*streams).sum(dtype=torch.float64)
