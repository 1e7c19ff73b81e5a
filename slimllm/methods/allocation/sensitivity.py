"""Sensitivity of the model's output to the loss of a sub-layer: damage to the dense model, measured at its end.

The curves of `slimllm.methods.allocation.auto` measure the loss in the residual stream after a sub-layer, but not its
effect through later layers. Therefore one sub-layer at a time loses half of its units or channels, on the first tokens of
one window. The damaged copies of the residual stream pass through the rest of the dense model together with the intact
one, in the same pass over the weights. The sub-layer's curve is multiplied by the damage at the end divided by the damage
where it was done.

All of this is in fp32, whatever dtype the model computes in. Damage is a difference of streams, and in half precision the
rounding errors of the streams would exceed it.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import nn

from slimllm.config import PruneConfig
from slimllm.methods.scores import fluctuation
from slimllm.models.layer import Layer, run_layer
from slimllm.models.mixture import route
from slimllm.models.sublayer import Sublayer

MOST_LAYERS = 8  # evenly spaced layers to damage, not counting the last one
MOST_STATES = 1 + 2 * (MOST_LAYERS + 1)
TOKENS = 128
BATCH_TOKENS = 1024


def probed_layers(num_layers: int) -> list[int]:
    """Return the layers to damage: evenly spaced ones, and the last one, which differs most from its neighbours."""
    return sorted({*range(0, num_layers, math.ceil(num_layers / MOST_LAYERS)), num_layers - 1})


class Probes:
    """Residual stream of a window, and damaged copies of it, on their way through the dense model.

    Args:
        window: The stream before the first layer, (1, tokens, D).
        kwargs: Keyword arguments of every layer for this window, with floating tensors in fp32.
        config: The settings.

    Attributes:
        states: The intact stream, and two copies for every layer damaged so far, (number, tokens, D) fp32.
        damage: J of the loss in each copy, weighted as the curves are: the squared loss, averaged over the dimensions,
            divided by the stream's mean square, and averaged over tokens.
    """

    def __init__(self, window: torch.Tensor, kwargs: list[dict[str, Any]], config: PruneConfig) -> None:
        self._kwargs, self._config = kwargs, config
        self._layers = probed_layers(len(kwargs))
        self.states = window.float()
        self.damage: list[float] = []

    def pass_layer(self, layer: Layer, index: int) -> list[float]:
        """Run a dense layer on all states, and add the copies that are damaged in it.

        Args:
            layer: The layer.
            index: Its number.

        Returns:
            The damage that was done in this layer.
        """
        kwargs, already, made = self._kwargs[index], len(self.damage), []
        if layer.dtype != torch.float32:
            layer = dataclasses.replace(layer, module=copy.deepcopy(layer.module).float(), dtype=torch.float32)
        if index in self._layers:
            hidden = self.states[:1]
            ffn = Sublayer.ffn_of(layer, index)
            for sublayer in (Sublayer.attention_of(layer, index, self._config.head_unit), ffn):
                whole, lost, damage = self._damaged(sublayer, hidden, kwargs)
                damaged = hidden + lost
                if sublayer.is_attention:
                    damaged = damaged + ffn.update_of(damaged, kwargs).view_as(damaged)
                made.append(damaged)
                self.damage.append(damage)
                hidden = hidden + whole
        # Masks and rotary embeddings of one window serve several windows; position biases do not.
        together = 1 if layer.spec.slopes else max(1, BATCH_TOKENS // self.states.shape[1])
        self.states = torch.cat([*(run_layer(layer, some, kwargs) for some in self.states.split(together)), *made])
        return self.damage[already:]

    def restore(self, states: torch.Tensor, damage: list[float]) -> None:
        """Resume from the states before an interruption."""
        self.states, self.damage = states, damage

    def factors(self, norm: nn.Module) -> list[list[float]]:
        """Return the factors of the curves of attention and of the FFN for each layer; call this after the last layer.

        Args:
            norm: The norm before the output head.
        """
        norm = copy.deepcopy(norm).float()
        whole, *copies = (norm(state[None]).double() for state in self.states)
        squares = whole.square().mean(-1)
        found = [
            float(((one - whole).square().mean(-1) / squares).mean()) / damage if damage > 0 else 0.0
            for one, damage in zip(copies, self.damage)
        ]
        by_part = []
        for part in range(2):
            # A sub-layer whose removed half did nothing gives no information.
            known = [(at, value) for at, value in zip(self._layers, found[part::2]) if value > 0 and math.isfinite(value)]
            at, values = zip(*known) if known else ((0,), (1.0,))
            by_part.append(np.interp(range(len(self._kwargs)), at, values).tolist())
        return [list(factors) for factors in zip(*by_part)]

    def _damaged(
        self, sublayer: Sublayer, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Return a sub-layer's residual update, the update without half of its units, and J of the difference."""
        x = sublayer.norm(hidden)
        if sublayer.experts:
            parts, output = route(sublayer, x.flatten(0, 1))
            error = torch.zeros_like(output)
            for part in parts:
                error.index_add_(0, part.tokens, _half(part.expert, part.inner * part.gates[:, None]))
        else:
            inner = sublayer.inner_activations(x, kwargs)
            output = sublayer.output_projection(inner)
            error = _half(sublayer, inner - inner.mean(0))  # a recovery makes up for the means
        gain = sublayer.post_norm_gain()
        seen = error if gain is None else error * gain
        weights = sublayer.token_weights(hidden, output)
        if self._config.token_weights == "none":
            weights = 1 / (1 / weights).mean()
        damage = float((weights * seen.square().mean(-1)).mean(dtype=torch.float64))
        added = [sublayer.residual_update(one).view_as(hidden) for one in (output, output - error)]
        return added[0], added[1], damage


def _half(sublayer: Sublayer, inner: torch.Tensor) -> torch.Tensor:
    """Return the output of the half of a sub-layer's units that adds least to it, from the inputs of its projection."""
    weight, units = sublayer.output_projection.weight, sublayer.units
    if sublayer.is_attention and units == 1:
        units = sublayer.layer.sizes().num_heads  # a single group has no half
    scores = fluctuation(sublayer.effective_weight(), inner.double().square().mean(0)).view(units, -1).sum(1)
    gone = torch.zeros_like(scores, dtype=torch.bool)
    gone[scores.argsort()[: max(1, units // 2)]] = True
    columns = gone.repeat_interleave(inner.shape[1] // units)
    return inner[:, columns] @ weight[:, columns].T
