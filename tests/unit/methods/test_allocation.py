from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import slimllm
from slimllm.config import PruneConfig
from slimllm.errors import InputError
from slimllm.methods.allocation.layer_importance import LayerImportance, paper_settings
from slimllm.methods.allocation.removal import LayerShape, most_removable
from slimllm.methods.allocation.spending import Curves
from slimllm.methods.allocation.target import Allocated, allocate, find_target
from slimllm.models.slicing import LayerSizes
from slimllm.pruning.shapes import layer_shapes

LLAMA_7B = LayerShape(32, 4 * 128 * 4096, 11008, 3 * 4096, 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096, 4096, 4096, False)
SMOLLM2 = LayerShape(3, 294_912, 1536, 1728, 3_540_096, 576, 576, True)


def removed(allocation: Allocated, shapes: list[LayerShape]) -> int:
    """Parameters that really go, biases added."""
    total = 0
    for removal, shape in zip(allocation.removals, shapes, strict=True):
        assert 0 <= removal.units < shape.units and 0 <= removal.channels < shape.channels
        total += removal.units * shape.unit_params + removal.channels * shape.channel_params
        total -= shape.attention_bias_params * (removal.units > 0) + shape.ffn_bias_params * (removal.channels > 0)
    return total


@settings(max_examples=60, deadline=None)
@given(
    ratio=st.floats(0.02, 0.85),
    similarity=st.lists(st.floats(0, 1), min_size=12, max_size=40),
    shape=st.sampled_from([LLAMA_7B, SMOLLM2]),
)
def test_the_target_is_met(ratio: float, similarity: list[float], shape: LayerShape) -> None:
    shapes = [shape] * len(similarity)
    allocation = allocate(similarity, shapes, PruneConfig(ratio, "slimllm"))
    total = sum(s.params for s in shapes)
    assert abs(removed(allocation, shapes) / total - ratio) <= 0.005 * ratio + 1e-9
    for removal in allocation.removals:
        assert (shape.channels - removal.channels) % allocation.round_to == 0


def layer(heads: int, kv_heads: int, channels: int) -> LayerSizes:
    """Of a model of which `shape_of` knows the rest."""
    params = 2 * 64 * (heads * 64 + kv_heads * 64) + 3 * 64 * channels
    return LayerSizes(heads, kv_heads, channels, False, False, params)


def shape_of(size: LayerSizes, settings: PruneConfig) -> LayerShape:
    source: Any = SimpleNamespace(head_dim=64, config=SimpleNamespace(hidden_size=64), sizes=lambda: [size], container=None)
    return layer_shapes(source, settings)[0]


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    allocation=st.sampled_from(["layer-importance", "uniform", "auto", "flap"]),
    head_unit=st.sampled_from(["kv-group", "query"]),
    heads=st.sampled_from([(12, 12), (32, 32), (24, 8), (32, 8), (12, 4), (8, 2), (6, 6), (6, 1)]),
    part=st.floats(0.05, 0.95),
)
def test_kept_heads_are_a_multiple(
    data: st.DataObject, allocation: str, head_unit: str, heads: tuple[int, int], part: float
) -> None:
    """In every layer, at least that many; and channels make up for the heads."""
    size = layer(*heads, 1536)
    split = heads[1] if size.by_group(head_unit) else heads[0]
    multiple_of = data.draw(st.sampled_from([n for n in range(1, split + 1) if split % n == 0]))
    num_layers = data.draw(st.integers(3, 8))
    config = PruneConfig(0.5, "slimllm", allocation=allocation, head_unit=head_unit, heads_multiple_of=multiple_of)
    shapes = [shape_of(size, config)] * num_layers
    total = sum(shape.params for shape in shapes)
    most = sum(most_removable(shape, math.lcm(64, multiple_of)) for shape in shapes)
    config = dataclasses.replace(config, ratio=part * most / total)
    cost = st.floats(0, 1)
    curves = None
    if allocation in ("auto", "flap"):
        units = shapes[0].units
        drawn = [data.draw(st.lists(cost, min_size=units + 16, max_size=units + 16)) for _ in shapes]
        curves = [
            Curves([0.0, *itertools.accumulate(one[:units])], [0.0, *itertools.accumulate(one[units:])]) for one in drawn
        ]
    similarity = data.draw(st.lists(cost, min_size=num_layers, max_size=num_layers))
    found = allocate(similarity, shapes, config, curves)
    for removal in found.removals:
        kept = size.without(removal.units, removal.channels, head_unit, True)
        number = kept.num_kv_heads if size.by_group(head_unit) else kept.num_heads
        assert number >= multiple_of and number % multiple_of == 0
        assert kept.intermediate_size % found.round_to == 0 and found.round_to % multiple_of == 0
        assert kept.num_kv_heads == heads[1] or size.by_group(head_unit)
    at_once = num_layers if allocation == "uniform" else 1
    half_step = at_once * found.round_to * shapes[0].channel_params / 2
    bias = at_once * (shapes[0].attention_bias_params + shapes[0].ffn_bias_params)
    assert abs(removed(found, shapes) - found.target_params) <= half_step + bias


def test_heads_give_way_where_channels_cannot() -> None:
    """Four heads at once are more than what is wanted of a layer, whose heads have most of its parameters."""
    config = PruneConfig(0.05, "slimllm", allocation=LayerImportance(alpha=0.0, pruned_layers=2), heads_multiple_of=4)
    shapes = [shape_of(layer(32, 32, 1536), config)] * 3
    found = allocate([0.5, 0.5, 0.5], shapes, config)
    assert sorted(removal.units for removal in found.removals) == [0, 0, 4]
    assert removed(found, shapes) == pytest.approx(found.target_params, abs=4 * 192 / 2 + 1) and not found.coarse


def test_heads_that_are_no_multiple_are_refused() -> None:
    for heads, head_unit, multiple_of, words in (
        ((6, 6), "kv-group", 4, "heads_multiple_of is 4, but a layer of the model has 6 KV heads.*a divisor of 6"),
        ((8, 4), "kv-group", 8, "8, but a layer of the model has 4 KV heads"),
        ((8, 4), "query", 3, "3, but a layer of the model has 8 query heads"),
        ((8, 8), "query", 3, "3, but a layer of the model has 8 KV heads"),
    ):
        settings = PruneConfig(0.2, "slimllm", head_unit=head_unit, heads_multiple_of=multiple_of)
        with pytest.raises(InputError, match=words):
            shape_of(layer(*heads, 2048), settings)


@pytest.mark.parametrize(
    ("head_unit", "multiple_of", "step"),
    [("kv-group", 1, 1), ("kv-group", 4, 4), ("query", 2, 1), ("query", 8, 1), ("query", 16, 2), ("query", 32, 4)],
)
def test_the_step_in_which_units_go(head_unit: str, multiple_of: int, step: int) -> None:
    """Of 32 query heads in 8 groups of 4."""
    assert layer(32, 8, 2048).unit_step(head_unit, multiple_of) == step


def test_the_most_that_whole_steps_can_give() -> None:
    shape = dataclasses.replace(SMOLLM2, units=4, unit_step=2, params=SMOLLM2.params + 294_912)
    assert most_removable(shape, 64) == 2 * 294_912 - 576 + (1536 - 64) * 1728 - 576
    with pytest.raises(InputError, match="while every layer keeps 2 head units and 64 channels"):
        find_target([shape] * 8, PruneConfig(0.95, "slimllm", round_to=64))


def test_widths_can_be_split_as_the_heads() -> None:
    """Where the rounding is left to slimllm."""
    for ratio, step in ((0.5, 192), (0.0002, 3)):
        shapes = [dataclasses.replace(SMOLLM2, unit_step=3)] * 32
        assert find_target(shapes, PruneConfig(ratio, "slimllm", heads_multiple_of=3)).round_to == step


def test_softmax_as_published() -> None:
    """r_ℓ = r · n · softmax(alpha c)_ℓ over the n layers of highest c, the rest left alone."""
    similarity = torch.linspace(0.90, 0.99, 32).tolist()
    allocation = allocate(similarity, [LLAMA_7B] * 32, PruneConfig(ratio=0.2, preset="paper"))
    weights = torch.softmax(10 * torch.tensor(similarity[6:], dtype=torch.float64), 0)
    wanted = [0.0] * 6 + (0.25 * 26 * weights).tolist()
    assert [removal.ratio for removal in allocation.removals] == pytest.approx(wanted, rel=1e-6)
    assert (allocation.pruned_layers, allocation.alpha, allocation.round_to) == (26, 10.0, 1)
    for removal in allocation.removals:
        assert (removal.units, removal.channels) == (round(removal.ratio * 32), round(removal.ratio * 11008))


def test_paper_preset_with_grouped_queries_meets_its_target() -> None:
    """Whole groups are coarse, and the paper has none: channels make up for them there."""
    similarity = torch.linspace(0.90, 0.99, 30).tolist()
    allocation = allocate(similarity, [SMOLLM2] * 30, PruneConfig(ratio=0.2, preset="paper"))
    assert removed(allocation, [SMOLLM2] * 30) / (30 * SMOLLM2.params) == pytest.approx(0.25 * 24 / 30, rel=0.001)


def test_paper_settings() -> None:
    assert paper_settings(0.2) == (0.25, 26 / 32, 10.0)
    assert paper_settings(0.5) == pytest.approx((0.55, 30 / 32, 7.0))
    assert paper_settings(0.35) == pytest.approx((0.40, 28 / 32, 8.5))
    assert paper_settings(0.1) == pytest.approx((0.125, 26 / 32, 10.0))
    allocation = allocate([0.9] * 32, [LLAMA_7B] * 32, PruneConfig(ratio=0.35, preset="paper"))
    assert any("interpolated" in note for note in allocation.notes)


def test_clamped_layers_hand_on_what_they_cannot_give() -> None:
    similarity = [0.999] + [0.5] * 9
    allocation = allocate(similarity, [LLAMA_7B] * 10, PruneConfig(0.5, "slimllm", allocation=LayerImportance(alpha=30.0)))
    assert allocation.removals[0].units == 31 and allocation.removals[0].channels == 11008 - 64
    assert removed(allocation, [LLAMA_7B] * 10) / (10 * LLAMA_7B.params) == pytest.approx(0.5, rel=0.005)


def test_more_layers_when_n_cannot_give_it() -> None:
    allocation = allocate(
        [0.9] * 10, [LLAMA_7B] * 10, PruneConfig(0.5, "slimllm", allocation=LayerImportance(pruned_layers=3))
    )
    assert allocation.pruned_layers > 3 and any("cannot give so much" in note for note in allocation.notes)
    assert removed(allocation, [LLAMA_7B] * 10) / (10 * LLAMA_7B.params) == pytest.approx(0.5, rel=0.005)


def test_almost_nothing_is_nothing() -> None:
    allocation = allocate([0.9] * 10, [SMOLLM2] * 10, PruneConfig(1e-6, "slimllm"))
    assert not any(removal.pruned for removal in allocation.removals)


def test_too_much_is_refused() -> None:
    with pytest.raises(InputError, match=r"more than this model can give.*the most is 0\.885"):
        allocate([0.9] * 4, [SMOLLM2] * 4, PruneConfig(0.99, "slimllm"))
    with pytest.raises(InputError, match="has 4 layers"):
        allocate([0.9] * 4, [SMOLLM2] * 4, PruneConfig(0.2, "slimllm", allocation=LayerImportance(pruned_layers=5)))


def test_a_width_that_is_no_multiple() -> None:
    shape = dataclasses.replace(SMOLLM2, channels=1500)
    allocation = allocate([0.9] * 12, [shape] * 12, PruneConfig(0.3, "slimllm", round_to=64))
    for removal in allocation.removals:
        assert removal.channels == 0 or (1500 - removal.channels) % 64 == 0


@pytest.mark.parametrize("alpha", [0.0, 1e3, 1e6])
def test_any_temperature(alpha: float) -> None:
    similarity = torch.linspace(0.1, 0.9, 10).tolist()
    allocation = allocate(similarity, [LLAMA_7B] * 10, PruneConfig(0.4, "slimllm", allocation=LayerImportance(alpha=alpha)))
    assert removed(allocation, [LLAMA_7B] * 10) / (10 * LLAMA_7B.params) == pytest.approx(0.4, rel=0.005)


def test_biases_that_the_format_adds_are_said(
    stories_path: Path, token_ids: torch.Tensor, tmp_path: Path, told: list[str]
) -> None:
    """All layers alike: a plain format, which has zero biases beside gate and up, misses the ratio by them."""
    config = PruneConfig(0.1, "slimllm", calibration=token_ids, allocation=LayerImportance(alpha=0.0, pruned_layers=5))
    report = slimllm.prune(stories_path, tmp_path / "out", config)
    assert abs(report.achieved_ratio - 0.1) > 0.0005
    (note,) = report.allocation["notes"]
    assert f"{report.achieved_ratio:.2%} smaller instead of 10.00%" in note and "biases of zero" in note
    assert f"{note}." in told


def test_single_heads_do_not_give_way() -> None:
    """Without multiples the removals are what they were: heads take their rounded share, and channels the rest."""
    config = PruneConfig(0.2, "slimllm", allocation=LayerImportance(alpha=0.0, pruned_layers=3), round_to=1)
    shapes = [shape_of(layer(4, 4, 16), config)] * 3
    assert [(one.units, one.channels) for one in allocate([0.5, 0.5, 0.4], shapes, config).removals] == [(1, 0)] * 3
