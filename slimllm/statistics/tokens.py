"""Per-token quantities: weights in the statistics, and similarity before and after a layer."""

from __future__ import annotations

import torch

from slimllm import ops

_EPSILON = 1e-6  # as in the norms, so that a token of zeros has a weight, too


def token_weights(
    hidden: torch.Tensor, added: torch.Tensor, output: torch.Tensor | None = None, centered: bool = False
) -> torch.Tensor:
    """Return 1 / mean square of the residual stream after a sub-layer, by token.

    The next norm divides a token's squared errors by this mean square.

    Args:
        hidden: The residual stream before the sub-layer, (..., D).
        added: Its residual update, (num_tokens, D).
        output: Its output before a post-norm, (num_tokens, D); None: there is no post-norm. The statistics are of this
            output, whose errors the post-norm divides by its root mean square. The gain of the post-norm is not part of
            the weights; see `Sublayer.post_norm_gain`.
        centered: The next norm is a LayerNorm: the variance over the dimensions replaces the mean square.

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
    """Return Σ_t cos(h_in[t], h_out[t]) over the tokens of a batch; the mean over all tokens is the layer's c.

    Args:
        hidden_in, hidden_out: (..., D), the residual stream before and after a decoder layer.

    Returns:
        fp64 scalar.
    """
    streams = (hidden_in.flatten(0, -2), hidden_out.flatten(0, -2))
    if hidden_in.dtype == torch.float64:
        streams = (streams[0].float(), streams[1].float())
    return ops.token_cosine(*streams).sum(dtype=torch.float64)
