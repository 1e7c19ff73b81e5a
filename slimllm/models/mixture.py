"""The forward pass of an FFN that is a mixture of experts, expert by expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from slimllm.models.sublayer import Sublayer


@dataclass(frozen=True)
class Routed:
    """What the tokens of a batch are to one of the experts.

    Attributes:
        number: The expert's number.
        expert: The expert, as an FFN.
        tokens: Numbers of the tokens that are routed to it, (n,) int64.
        gates: Their gates g, (n,).
        inner: The inputs z of its output projection, (n, I).
        output: The output of that projection, (n, D).
    """

    number: int
    expert: Sublayer
    tokens: torch.Tensor
    gates: torch.Tensor
    inner: torch.Tensor
    output: torch.Tensor


def route(ffn: Sublayer, x: torch.Tensor) -> tuple[list[Routed], torch.Tensor]:
    """Run the experts on the tokens that are routed to them.

    Args:
        ffn: The mixture.
        x: The norm's output, (num_tokens, D).

    Returns:
        What every expert that has tokens makes of them, and the output of the mixture, (num_tokens, D).
    """
    mixture: Any = ffn.mixture
    output, parts = torch.zeros_like(x), []
    for number, tokens, gates in mixture.route(x):
        expert = ffn.experts[number]
        inner = expert.inner_activations(x[tokens][None], {})
        own = linear(inner, expert.output_projection.weight)
        parts.append(Routed(number, expert, tokens, gates, inner, own))
        output.index_add_(0, tokens, (own * gates[:, None]).to(x.dtype))
    return parts, output
