from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimllm.methods.allocation.removal import LayerRemoval, LayerShape, most_removable, removed_params
from slimllm.methods.allocation.spending import Curves, hull, sampled, spend

SHAPE = LayerShape(8, 1000, 96, 30, 8000 + 96 * 30, 40, 40, False)
costs = st.lists(st.floats(0, 10), min_size=8, max_size=8)


def curve(steps: list[float]) -> list[float]:
    return [0.0, *itertools.accumulate(steps)]


@given(values=st.lists(st.floats(-5, 5), min_size=2, max_size=40))
def test_hull_is_below_and_convex(values: list[float]) -> None:
    points = len(values)
    below = hull(values, [i / (points - 1) for i in range(points)])
    assert all(b <= v + 1e-9 for b, v in zip(below, values))
    slopes = [b - a for a, b in itertools.pairwise(below)]
    assert all(second >= first - 1e-9 for first, second in itertools.pairwise(slopes))
    assert below[0] == pytest.approx(values[0]) and below[-1] == pytest.approx(values[-1])


@settings(max_examples=60, deadline=None)
@given(
    of_layers=st.lists(st.tuples(costs, st.lists(st.floats(0, 1), min_size=96, max_size=96)), min_size=2, max_size=6),
    ratio=st.floats(0.05, 0.8),
    round_to=st.sampled_from([1, 8, 32]),
)
def test_the_budget_is_met(of_layers: list[tuple[list[float], list[float]]], ratio: float, round_to: int) -> None:
    shapes = [SHAPE] * len(of_layers)
    target = round(ratio * sum(most_removable(shape, round_to) for shape in shapes))
    curves = [Curves(curve(heads), curve(channels)) for heads, channels in of_layers]
    found = spend(curves, shapes, target, round_to)
    removed = sum(removed_params(LayerRemoval(0, *one), shape) for one, shape in zip(found, shapes))
    assert abs(removed - target) <= round_to * 30 / 2 + 40  # half a step of channels, and a bias
    for units, channels in found:
        assert 0 <= units < 8 and 0 <= channels < 96 and (channels == 0 or (96 - channels) % round_to == 0)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_other_way_to_spend_as_much_loses_less(data: st.DataObject) -> None:
    """Against all ways, where units cost what steps of channels cost and all curves are convex."""
    shape = LayerShape(3, 100, 4, 100, 700, 0, 0, False)
    grow = st.lists(st.floats(0, 1), min_size=4, max_size=4)
    curves = []
    for _ in range(2):
        heads, channels = (curve(sorted(data.draw(grow)[:n])) for n in (3, 4))
        curves.append(Curves(heads, channels))
    steps = data.draw(st.integers(1, 9))
    found = spend(curves, [shape, shape], 100 * steps, 1)

    def lost(ways: list[tuple[int, int]]) -> float:
        return sum(one.attention[units] + one.ffn[channels] for one, (units, channels) in zip(curves, ways))

    options = [(units, channels) for units in range(3) for channels in range(4)]
    ways = [list(way) for way in itertools.product(options, repeat=2) if sum(map(sum, way)) == steps]
    assert sum(map(sum, found)) == steps
    assert lost(found) == pytest.approx(min(map(lost, ways)))


def test_samples_of_a_curve() -> None:
    costs = torch.arange(1000, dtype=torch.float64)
    values = sampled(costs)
    assert len(values) == 257 and values[0] == 0 and values[-1] == float(costs.sum())
    assert values[128] == float(costs[:500].sum())
    assert sampled(torch.tensor([1.0, 2.0])) == [0.0, 1.0, 3.0]


def test_a_unit_more_and_channels_back() -> None:
    """Where all channels are gone, and each unit is more than is left."""
    curves = [Curves(curve([1.0] * 8), [0.0] * 97)] * 2
    target = 2 * most_removable(SHAPE, 8) - 13 * 1000 - 150  # half a unit beside all channels
    found = spend(curves, [SHAPE, SHAPE], target, 8)
    removed = sum(removed_params(LayerRemoval(0, *one), SHAPE) for one in found)
    assert abs(removed - target) <= 8 * 30 / 2 + 40 and sum(units for units, _ in found) == 1


def test_a_curve_that_is_no_number() -> None:
    with pytest.raises(ValueError, match="curve of layer 1's ffn has values that are not finite"):
        spend([Curves(curve([1.0] * 8), [0.0] * 97), Curves(curve([1.0] * 8), [float("nan")] * 97)], [SHAPE] * 2, 999, 8)


def test_what_costs_nothing_goes_first() -> None:
    flat, steep = [0.0] * 9, curve([1.0] * 8)
    curves = [Curves(steep, curve([1.0] * 96)), Curves(flat, [0.0] * 97)]
    found = spend(curves, [SHAPE, SHAPE], most_removable(SHAPE, 8), 8)
    assert found == [(0, 0), (7, 88)]
