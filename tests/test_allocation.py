from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import slimllm
from slimllm.allocation import Allocation, LayerShape, allocate, paper_settings
from slimllm.config import PruneConfig
from slimllm.errors import InputError

LLAMA_7B = LayerShape(32, 4 * 128 * 4096, 11008, 3 * 4096, 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096, 4096, 4096, False)
SMOLLM2 = LayerShape(3, 294_912, 1536, 1728, 3_540_096, 576, 576, True)


def removed(allocation: Allocation, shapes: list[LayerShape]) -> int:
    """Parameters that really go, biases added."""
    total = 0
    for budget, shape in zip(allocation.budgets, shapes, strict=True):
        assert 0 <= budget.units < shape.units and 0 <= budget.channels < shape.channels
        total += budget.units * shape.unit_params + budget.channels * shape.channel_params
        total -= shape.attention_bias_params * (budget.units > 0) + shape.ffn_bias_params * (budget.channels > 0)
    return total


@settings(max_examples=60, deadline=None)
@given(
    ratio=st.floats(0.02, 0.85),
    similarity=st.lists(st.floats(0, 1), min_size=12, max_size=40),
    shape=st.sampled_from([LLAMA_7B, SMOLLM2]),
)
def test_the_target_is_met(ratio: float, similarity: list[float], shape: LayerShape) -> None:
    shapes = [shape] * len(similarity)
    allocation = allocate(similarity, shapes, PruneConfig(ratio=ratio))
    total = sum(s.params for s in shapes)
    assert abs(removed(allocation, shapes) / total - ratio) <= 0.005 * ratio + 1e-9
    for budget in allocation.budgets:
        assert (shape.channels - budget.channels) % allocation.round_to == 0


def test_softmax_as_published() -> None:
    """r_ℓ = r · n · softmax(alpha c)_ℓ over the n layers of highest c, the rest left alone."""
    similarity = torch.linspace(0.90, 0.99, 32).tolist()
    allocation = allocate(similarity, [LLAMA_7B] * 32, PruneConfig(ratio=0.2, preset="paper"))
    weights = torch.softmax(10 * torch.tensor(similarity[6:], dtype=torch.float64), 0)
    wanted = [0.0] * 6 + (0.25 * 26 * weights).tolist()
    assert [budget.ratio for budget in allocation.budgets] == pytest.approx(wanted, rel=1e-6)
    assert (allocation.pruned_layers, allocation.alpha, allocation.round_to) == (26, 10.0, 1)
    for budget in allocation.budgets:
        assert (budget.units, budget.channels) == (round(budget.ratio * 32), round(budget.ratio * 11008))


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
    allocation = allocate(similarity, [LLAMA_7B] * 10, PruneConfig(ratio=0.5, alpha=30.0))
    assert allocation.budgets[0].units == 31 and allocation.budgets[0].channels == 11008 - 64
    assert removed(allocation, [LLAMA_7B] * 10) / (10 * LLAMA_7B.params) == pytest.approx(0.5, rel=0.005)


def test_more_layers_when_n_cannot_give_it() -> None:
    allocation = allocate([0.9] * 10, [LLAMA_7B] * 10, PruneConfig(ratio=0.5, pruned_layers=3))
    assert allocation.pruned_layers > 3 and any("cannot give so much" in note for note in allocation.notes)
    assert removed(allocation, [LLAMA_7B] * 10) / (10 * LLAMA_7B.params) == pytest.approx(0.5, rel=0.005)


def test_almost_nothing_is_nothing() -> None:
    allocation = allocate([0.9] * 10, [SMOLLM2] * 10, PruneConfig(ratio=1e-6))
    assert not any(budget.pruned for budget in allocation.budgets)


def test_too_much_is_refused() -> None:
    with pytest.raises(InputError, match=r"more than this model can give.*the most is 0\.885"):
        allocate([0.9] * 4, [SMOLLM2] * 4, PruneConfig(ratio=0.99))
    with pytest.raises(InputError, match="has 4 layers"):
        allocate([0.9] * 4, [SMOLLM2] * 4, PruneConfig(ratio=0.2, pruned_layers=5))


def test_a_width_that_is_no_multiple() -> None:
    shape = dataclasses.replace(SMOLLM2, channels=1500)
    allocation = allocate([0.9] * 12, [shape] * 12, PruneConfig(ratio=0.3, round_to=64))
    for budget in allocation.budgets:
        assert budget.channels == 0 or (1500 - budget.channels) % 64 == 0


@pytest.mark.parametrize("alpha", [0.0, 1e3, 1e6])
def test_any_temperature(alpha: float) -> None:
    similarity = torch.linspace(0.1, 0.9, 10).tolist()
    allocation = allocate(similarity, [LLAMA_7B] * 10, PruneConfig(ratio=0.4, alpha=alpha))
    assert removed(allocation, [LLAMA_7B] * 10) / (10 * LLAMA_7B.params) == pytest.approx(0.4, rel=0.005)


def test_biases_that_the_format_adds_are_said(stories_path: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    """All layers alike: a plain format, which has zero biases beside gate and up, misses the ratio by them."""
    notices: list[str] = []
    config = PruneConfig(ratio=0.1, calibration=token_ids, alpha=0.0, pruned_layers=5)
    report = slimllm.prune(stories_path, tmp_path / "out", config, notice=notices.append)
    assert abs(report.achieved_ratio - 0.1) > 0.0005
    (note,) = report.allocation["notes"]
    assert f"{report.achieved_ratio:.2%} smaller instead of 10.00%" in note and "biases of zero" in note
    assert f"{note}." in notices
