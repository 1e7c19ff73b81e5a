"""How much the model's output cares about a sub-layer, against the whole model run with that sub-layer damaged."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from conftest import pruned, random_llama
from tiny_models import PECULIAR, tiny

from slimllm import PruneConfig
from slimllm.calibration import Calibration
from slimllm.methods.allocation.sensitivity import MOST_LAYERS, TOKENS, probed_layers
from slimllm.models.families import family_of
from slimllm.pruning.dense_pass import DensePass


def dense_pass(model: Any, token_ids: torch.Tensor, **settings: Any) -> DensePass:
    config = PruneConfig(ratio=0.2, preset="best", **settings)
    return pruned(copy.deepcopy(model), Calibration(token_ids), config).dense


@torch.no_grad()
def reference(model: Any, window: torch.Tensor, index: int, part: str, weighted: bool) -> float:
    """In fp64, with hooks on the whole model: what becomes of the damage at the end, over its J."""
    model = copy.deepcopy(model).double()
    layer, layers = model.model.layers[index], model.model.layers
    projection = layer.self_attn.o_proj if part == "attention" else layer.mlp.down_proj
    # The norm that reads the stream behind the sub-layer.
    ahead = layers[index + 1].input_layernorm if index + 1 < len(layers) else model.model.norm
    behind = layer.post_attention_layernorm if part == "attention" else ahead
    units = (
        layer.self_attn.k_proj.weight.shape[0] // layer.self_attn.head_dim
        if part == "attention"
        else projection.in_features
    )
    found: dict[str, torch.Tensor] = {}

    def whole(module: Any, inputs: Any) -> None:
        found["stream"] = inputs[0][0]

    def damage(module: Any, inputs: Any, output: Any) -> torch.Tensor:
        z = inputs[0][0]
        centered = z - z.mean(0)
        scores = (centered.square().mean(0) * module.weight.square().sum(0)).view(units, -1).sum(1)
        gone = scores.argsort()[: units // 2]
        width = z.shape[1] // units
        columns = torch.cat([torch.arange(int(unit) * width, (int(unit) + 1) * width) for unit in gone])
        found["error"] = centered[:, columns] @ module.weight[:, columns].T
        return output - found["error"]

    hook = behind.register_forward_pre_hook(whole)
    end = model.model(window).last_hidden_state[0]
    hook.remove()
    hook = projection.register_forward_hook(damage)
    damaged = model.model(window).last_hidden_state[0]
    hook.remove()
    squares = found["stream"].square().mean(-1)
    lost = found["error"].square().mean(-1)
    j = (lost / (squares + 1e-6)).mean() if weighted else lost.mean() / (squares + 1e-6).mean()
    return float(((damaged - end).square().mean(-1) / end.square().mean(-1)).mean() / j)


@pytest.mark.parametrize("token_weights", ["norm", "none"])
def test_against_the_whole_model(stories: Any, token_ids: torch.Tensor, token_weights: str) -> None:
    """All five layers are probed: attention and FFN of each."""
    factors = dense_pass(stories, token_ids, token_weights=token_weights).factors
    for index, of_layer in enumerate(factors):
        for part, factor in zip(("attention", "ffn"), of_layer):
            expected = reference(stories, token_ids[:1], index, part, token_weights == "norm")
            assert factor == pytest.approx(expected, rel=1e-4), (index, part)


def test_first_tokens_of_a_longer_window(stories: Any, token_ids: torch.Tensor) -> None:
    long = token_ids.view(4, 256)
    assert TOKENS < 256
    factors = dense_pass(stories, long).factors
    assert factors[2][1] == pytest.approx(reference(stories, long[:1, :TOKENS], 2, "ffn", True), rel=1e-4)


def test_hard_activations() -> None:
    """Means far above their spread, dead and dominating channels."""
    model, ids = random_llama(), torch.arange(4 * 32).view(4, 32) % 128
    for index, of_layer in enumerate(dense_pass(model, ids).factors):
        for part, factor in zip(("attention", "ffn"), of_layer):
            assert factor == pytest.approx(reference(model, ids[:1], index, part, True), rel=2e-3)


def test_half_precision() -> None:
    """The same as of an fp32 model with these weights: rounding does not pass for damage."""
    model, ids = random_llama(num_hidden_layers=24).bfloat16(), torch.arange(4 * 32).view(4, 32) % 128
    half, full = (dense_pass(one, ids).factors for one in (model, copy.deepcopy(model).float()))
    assert torch.allclose(torch.tensor(half), torch.tensor(full), rtol=1e-3)


@pytest.mark.parametrize("head_unit", ["kv-group", "query"])
@pytest.mark.parametrize("family", sorted(PECULIAR))
def test_every_family(family: str, head_unit: str) -> None:
    """What becomes of the damage, factor times J, against the whole model with the same taken out of one projection."""
    model = tiny(family)
    ids = torch.randint(3, 96, (12, 24), generator=torch.Generator().manual_seed(0))
    dense, spec = dense_pass(model, ids, head_unit=head_unit), family_of(model.config.model_type)
    for index, part in ((0, 0), (2, 1), (3, 0)):
        layer = model.get_submodule(f"{spec.layers}.{index}")
        projection = layer.get_submodule(spec.down_proj if part else spec.o_proj)
        norm = spec.ffn_post_norm if part else spec.attention_post_norm
        gain = layer.get_submodule(norm)(torch.ones(48)) if norm else torch.ones(48)
        heads = (
            PECULIAR[family].get("num_key_value_heads", 3) if head_unit == "kv-group" else model.config.num_attention_heads
        )
        units = 96 if part else heads

        def damaged(module: Any, inputs: Any, output: Any, gain: Any = gain, units: int = units) -> torch.Tensor:
            z = inputs[0].flatten(0, -2)
            centered = z - z.mean(0)
            seen = module.weight * gain[:, None]
            scores = (centered.square().mean(0) * seen.square().sum(0)).view(units, -1).sum(1)
            gone = torch.zeros(units, dtype=torch.bool)
            gone[scores.argsort()[: units // 2]] = True
            columns = gone.repeat_interleave(z.shape[1] // units)
            return output - (centered[:, columns] @ module.weight[:, columns].T).view_as(output)

        with torch.no_grad():
            end = model(ids[:1], output_hidden_states=True).hidden_states[-1]
            hook = projection.register_forward_hook(damaged)
            other = model(ids[:1], output_hidden_states=True).hidden_states[-1]
            hook.remove()
        change = float(((other - end).square().mean(-1) / end.square().mean(-1)).mean())
        found = dense.factors[index][part] * dense.layers[index].damage[part]
        assert found == pytest.approx(change, rel=1e-3), (index, part)


def test_a_single_group_loses_half_of_its_heads() -> None:
    model = random_llama(num_key_value_heads=1, attention_bias=False)
    ids = torch.arange(4 * 32).view(4, 32) % 128
    found, reference_of_heads = dense_pass(model, ids), copy.deepcopy(model)
    with torch.no_grad():  # the same function, every head with keys and values of its own
        for layer in reference_of_heads.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.weight = torch.nn.Parameter(projection.weight.repeat(6, 1))
            layer.self_attn.num_key_value_groups = 1
    reference_of_heads.config.num_key_value_heads = 6
    assert found.factors[1][0] == pytest.approx(reference(reference_of_heads, ids[:1], 1, "attention", True), rel=2e-3)


def test_layers_between(token_ids: torch.Tensor) -> None:
    model = random_llama(num_hidden_layers=2 * MOST_LAYERS)
    dense = dense_pass(model, torch.arange(2 * 16).view(2, 16))
    factors = dense.factors
    probed = probed_layers(2 * MOST_LAYERS)
    assert probed == [*range(0, 2 * MOST_LAYERS, 2), 2 * MOST_LAYERS - 1]
    assert [len(layer.damage) for layer in dense.layers] == [
        2 if index in probed else 0 for index in range(2 * MOST_LAYERS)
    ]
    for part in range(2):
        assert factors[5][part] == pytest.approx((factors[4][part] + factors[6][part]) / 2)


def test_dead_sublayers_tell_nothing(stories: Any, token_ids: torch.Tensor) -> None:
    with torch.no_grad():
        stories.model.layers[2].mlp.down_proj.weight.zero_()
    factors = dense_pass(stories, token_ids).factors
    assert factors[2][1] == pytest.approx((factors[1][1] + factors[3][1]) / 2)
    with torch.no_grad():
        for layer in stories.model.layers:
            layer.mlp.down_proj.weight.zero_()
    assert [of_layer[1] for of_layer in dense_pass(stories, token_ids).factors] == [1.0] * 5


def test_curves_are_multiplied(stories: Any, token_ids: torch.Tensor) -> None:
    dense = dense_pass(stories, token_ids)
    curves = dense.curves()
    assert curves is not None
    for layer, factors, curve in zip(dense.layers, dense.factors, curves):
        raw = layer.curves
        assert all(math.isfinite(factor) and factor > 0 for factor in factors)
        assert curve.ffn == [factors[1] * value for value in raw.ffn]
        assert curve.attention == [factors[0] * value for value in raw.attention]
    assert dataclasses.replace(dense, measured=None).curves() is None
