"""How much the model's output cares about what a sub-layer loses: damage to the dense model, carried to its end.

The curves of `slimllm.measure` say what the residual stream behind a sub-layer loses, not what the layers behind make of
that. So one sub-layer at a time loses half of its units or channels, on the first tokens of one window; the damaged copies
of its residual stream go through the rest of the dense model beside the whole one, in the same pass over the weights, and
what becomes of the damage, over what it was, is what the sub-layer's curve is multiplied by.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from slimllm.config import PruneConfig
from slimllm.criteria import fluctuation
from slimllm.layer import Layer, inner_activations, run_layer, sublayer_output

MOST_LAYERS = 16  # that are damaged, evenly spread; between them the factors hardly differ
MOST_PROBES = 2 * (MOST_LAYERS + 1)
TOKENS = 128


def probed_layers(num_layers: int) -> list[int]:
    """The layers that are damaged: every so many, and the last one, which differs most from its neighbours."""
    return sorted({*range(0, num_layers, math.ceil(num_layers / MOST_LAYERS)), num_layers - 1})


class Probes:
    """Damaged copies of a window's residual stream on their way through the dense model.

    Args:
        kwargs: How every layer is called on the one window, (1, tokens, D).
        config: The settings.

    Attributes:
        states: The copies, (number, tokens, D), two for every layer damaged so far; None before the first.
        damage: J of what each has lost, in the units of the curves.
    """

    def __init__(self, kwargs: list[dict[str, Any]], config: PruneConfig) -> None:
        self._kwargs, self._config = kwargs, config
        self._layers = probed_layers(len(kwargs))
        self.states: torch.Tensor | None = None
        self.damage: list[float] = []

    def pass_layer(self, layer: Layer, window: torch.Tensor, index: int) -> list[float]:
        """Let all copies pass a dense layer, and make those that are damaged in it.

        Args:
            layer: The layer.
            window: The whole stream before it, (1, tokens, D).
            index: Its number.

        Returns:
            The damage that was done in it.
        """
        kwargs = self._kwargs[index]
        already = len(self.damage)
        # One by one: masks and biases are of one window.
        behind = [] if self.states is None else [run_layer(layer, state[None], kwargs) for state in self.states]
        if index in self._layers:
            for projection in (layer.spec.o_proj, layer.spec.down_proj):
                whole, lost, damage = self._damaged(layer, projection, window, kwargs)
                damaged = window + lost
                if projection == layer.spec.o_proj:
                    damaged = damaged + sublayer_output(layer, layer.spec.down_proj, damaged, kwargs).view_as(damaged)
                behind.append(damaged)
                self.damage.append(damage)
                window = window + whole
        self.states = torch.cat(behind) if behind else None
        return self.damage[already:]

    def restore(self, states: torch.Tensor, damage: list[float]) -> None:
        """Go on with copies that have been made."""
        self.states, self.damage = states, damage

    def factors(self, window: torch.Tensor, norm: nn.Module) -> list[list[float]]:
        """What the curves of attention and of the FFN are to be multiplied by, for each layer.

        Args:
            window: The whole stream behind the last layer, (1, tokens, D).
            norm: The norm before the output head.
        """
        assert self.states is not None
        whole = norm(window).double()
        squares = whole.square().mean(-1)
        found = [
            float(((norm(state[None]).double() - whole).square().mean(-1) / squares).mean()) / damage if damage > 0 else 0.0
            for state, damage in zip(self.states, self.damage)
        ]  # fmt: skip
        by_part = []
        for part in range(2):
            # A sub-layer whose half does nothing tells nothing.
            known = [(at, value) for at, value in zip(self._layers, found[part::2]) if value > 0 and math.isfinite(value)]
            at, values = zip(*known) if known else ((0,), (1.0,))
            by_part.append(np.interp(range(len(self._kwargs)), at, values).tolist())
        return [list(factors) for factors in zip(*by_part)]

    def _damaged(
        self, layer: Layer, projection: str, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """What a sub-layer adds to the stream, what it adds without half of its units, and J of the difference."""
        attention = projection == layer.spec.o_proj
        norm = layer.module.get_submodule(layer.spec.attention_norm if attention else layer.spec.ffn_norm)
        inner = inner_activations(layer, projection, norm(hidden), kwargs if attention else None)
        linear, sizes, gain = layer.linear(projection), layer.sizes(), layer.gain(projection)
        centered = inner - inner.mean(0)  # a recovery makes good for the means
        units = sizes.units(self._config.head_unit)[0] if attention else sizes.intermediate_size
        scores = fluctuation(layer.seen(projection), centered.double().square().mean(0)).view(units, -1).sum(1)
        gone = torch.zeros_like(scores, dtype=torch.bool)
        gone[scores.argsort()[: max(1, units // 2)]] = True
        columns = gone.repeat_interleave(inner.shape[1] // units)
        output = linear(inner)
        error = centered[:, columns] @ linear.weight[:, columns].T
        seen = error if gain is None else error * gain
        weights = layer.weights(projection, hidden, output)
        if self._config.token_weights == "none":
            weights = 1 / (1 / weights).mean()
        damage = float((weights * seen.float().square().mean(-1)).mean(dtype=torch.float64))
        added = [layer.behind(projection, one).view_as(hidden) for one in (output, output - error)]
        return added[0], added[1], damage
