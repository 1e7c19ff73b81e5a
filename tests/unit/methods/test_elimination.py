from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from slimllm import InputError, ops
from slimllm.methods import elimination
from slimllm.methods.elimination import channel_costs, eliminate_channels, eliminate_heads, unit_costs
from slimllm.methods.ridge import column_scale
from slimllm.methods.surgeon import ELIMINATION_RIDGE, ELIMINATION_RIDGE_OF_FEW, Surgeon, half_solved
from slimllm.statistics import GramStatistics

KINDS = ("plain", "few tokens", "large means", "dead", "twins")


def activations(kind: str, features: int = 48, outputs: int = 20, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (N, F) and a weight (D, F) that are hard in one way."""
    torch.manual_seed(seed)
    x = torch.randn(16 if kind == "few tokens" else 400, features) @ torch.randn(features, features) * torch.rand(features)
    if kind == "large means":
        x += 1e3 * torch.randn(features)
    if kind == "dead":
        x[:, 3:7] = 0.0
    if kind == "twins":
        x[:, 1] = 2 * x[:, 0]
    return x, torch.randn(outputs, features)


def statistics_of(x: torch.Tensor) -> GramStatistics:
    statistics = GramStatistics(x.shape[1])
    for batch in x.split(37):
        statistics.update(batch)
    return statistics


def system_of(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """H and V in plain fp64, from the tokens themselves."""
    x = x.double()
    covariance = (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)
    scale = column_scale(covariance.diagonal(), x.mean(0))
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    ridge = ELIMINATION_RIDGE_OF_FEW if len(x) < 2 * len(scale) else ELIMINATION_RIDGE
    h = covariance * inverse[:, None] * inverse + ridge * torch.eye(len(scale), dtype=torch.float64)
    return h, weight.double() * scale


def least(h: torch.Tensor, v: torch.Tensor, gone: list[int]) -> tuple[float, torch.Tensor]:
    """The least J without some columns, and the weights of the others, by solving for them."""
    left = [i for i in range(len(h)) if i not in gone]
    cross = torch.linalg.solve(h[left][:, left], h[left][:, gone])
    schur = h[gone][:, gone] - h[gone][:, left] @ cross
    return float((v[:, gone] @ schur @ v[:, gone].T).trace()), v[:, left] + v[:, gone] @ cross.T


def plain_greedy(h: torch.Tensor, v: torch.Tensor, units: list[list[int]], num: int) -> tuple[list[int], list[float]]:
    """Unit after unit, each time solving for every candidate anew."""
    order: list[int] = []
    total = [0.0]
    for _ in range(num):
        costs = {
            u: least(h, v, [column for one in [*order, u] for column in units[one]])[0]
            for u in range(len(units))
            if u not in order
        }
        best = min(costs, key=lambda u: costs[u])
        order.append(best)
        total.append(costs[best])
    return order, total


@pytest.mark.parametrize("kind", KINDS)
def test_channels_one_by_one_are_the_plain_greedy_choice(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elimination, "BLOCKS", 10**6)  # blocks of one channel
    x, weight = activations(kind)
    h, v = system_of(x, weight)
    order, totals = plain_greedy(h, v, [[i] for i in range(x.shape[1])], 30)
    surgeon = Surgeon(weight, statistics_of(x))
    alone = channel_costs(surgeon)
    assert alone.tolist() == pytest.approx([least(h, v, [i])[0] for i in range(len(h))], rel=2e-3, abs=1e-6 * totals[-1])
    found = eliminate_channels(surgeon, 30)
    assert found.costs.cumsum(0).tolist() == pytest.approx(totals[1:], rel=5e-3, abs=1e-6 * totals[-1])
    if kind != "dead":  # four cost nothing at first, in any order
        assert found.order.tolist() == order


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [3, 8])
def test_blocks_measure_what_they_do(kind: str, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The costs are the error of what really goes, and hardly more than of the choice one by one."""
    monkeypatch.setattr(elimination, "BLOCKS", blocks)
    x, weight = activations(kind)
    h, v = system_of(x, weight)
    surgeon = Surgeon(weight, statistics_of(x))
    found = eliminate_channels(surgeon, 29)
    assert len(set(found.order.tolist())) == 29 and (found.costs >= 0).all()
    cost, left = least(h, v, found.order.tolist())
    assert float(found.costs.sum()) == pytest.approx(cost, rel=5e-3)
    kept = [i for i in range(48) if i not in found.order.tolist()]
    surgeon = Surgeon(weight, statistics_of(x))
    surgeon.remove(found.order)
    tolerance = 5e-3 * float(v.abs().max())
    torch.testing.assert_close(surgeon.weight[kept].T.double(), left, rtol=5e-3, atol=tolerance)
    assert float(surgeon.weight[found.order].abs().max()) <= tolerance
    assert cost <= 1.25 * plain_greedy(h, v, [[i] for i in range(len(h))], 29)[1][-1]


def test_the_largest_block_limits_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = activations("plain")
    monkeypatch.setattr(elimination, "BLOCKS", 8)  # of 6 channels
    wanted = eliminate_channels(Surgeon(weight, statistics_of(x)), 29)
    monkeypatch.setattr(elimination, "BLOCKS", 1)
    monkeypatch.setattr(elimination, "LARGEST_BLOCK", 6)
    found = eliminate_channels(Surgeon(weight, statistics_of(x)), 29)
    assert found.order.tolist() == wanted.order.tolist() and found.costs.tolist() == wanted.costs.tolist()


def test_one_of_two_that_stand_in_for_each_other_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each alone costs next to nothing, both together all that they do: also within one block."""
    monkeypatch.setattr(elimination, "BLOCKS", 3)
    x, weight = activations("twins")
    weight[:, :2] *= 5
    found = eliminate_channels(Surgeon(weight, statistics_of(x)), 16)
    assert len({0, 1} & set(found.order.tolist())) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_heads(kind: str) -> None:
    x, weight = activations(kind)
    h, v = system_of(x, weight)
    units = [list(range(8 * u, 8 * u + 8)) for u in range(6)]
    order, totals = plain_greedy(h, v, units, 5)
    surgeon = Surgeon(weight, statistics_of(x))
    assert unit_costs(surgeon, 6).tolist() == pytest.approx([least(h, v, unit)[0] for unit in units], rel=5e-3)
    found = eliminate_heads(surgeon, 6, 6)
    assert found.order[:5].tolist() == order
    assert found.costs.cumsum(0)[:5].tolist() == pytest.approx(totals[1:], rel=5e-3)
    assert float(found.costs.sum()) == pytest.approx(least(h, v, list(range(48)))[0], rel=5e-3)


def test_as_many_heads_of_every_group() -> None:
    x, weight = activations("plain")
    found = eliminate_heads(Surgeon(weight, statistics_of(x)), 6, 2, num_groups=2)
    groups = (found.order // 3).tolist()
    assert groups == [0, 1, 0, 1] and len(set(found.order.tolist())) == 4


def test_nothing_goes() -> None:
    x, weight = activations("plain")
    surgeon = Surgeon(weight, statistics_of(x))
    assert len(eliminate_channels(surgeon, 0).order) == 0 and len(eliminate_heads(surgeon, 6, 0).order) == 0


def test_what_rounding_has_made_indefinite() -> None:
    """A result is found all the same, for nearly the same matrix; if there is none at all, it is said."""
    x, weight = activations("plain")
    vectors = torch.linalg.qr(torch.randn(60, 60)).Q
    matrix = (vectors * torch.cat([torch.full((1,), -1e-5), torch.ones(59)])) @ vectors.T
    right = vectors[:, 1:] @ torch.randn(59, 4)  # not along the direction that rounding has spoilt
    careful = Surgeon(weight, statistics_of(x), careful=True)
    found = careful.solved(ops.quadratic_forms, matrix.clone()[None], right[None])
    assert float(found) == pytest.approx(float(right.square().sum()), rel=1e-2)
    with pytest.raises(InputError, match="ill-conditioned"):
        careful.solved(half_solved, torch.full((1, 3, 3), torch.nan), torch.ones(1, 3, 2))
    statistics = statistics_of(x)
    statistics.gram.fill_(torch.nan)
    with pytest.raises(InputError, match="ill-conditioned"):
        Surgeon(weight, statistics)


@pytest.mark.parametrize("part", ["channels", "heads"])
def test_a_failed_factor_is_made_up_for(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is done again with checked factors, with the result of those."""
    x, weight = activations("plain")

    def eliminated(surgeon: Surgeon) -> elimination.Elimination:
        return eliminate_channels(surgeon, 29) if part == "channels" else eliminate_heads(surgeon, 6, 4)

    wanted = eliminated(Surgeon(weight, statistics_of(x), careful=True))
    solve, calls = ops.half_solve_, 0

    def fails_once(matrices: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        failed = solve(matrices, right)
        if calls != 2:
            return failed
        right.fill_(torch.nan)
        return ~failed

    monkeypatch.setattr(ops, "half_solve_", fails_once)
    found = eliminated(Surgeon(weight, statistics_of(x)))
    assert calls > 5
    assert torch.equal(found.order, wanted.order) and torch.equal(found.costs, wanted.costs)


def test_dropped_columns_leave_the_others_as_they_were() -> None:
    """In place, with more rows than are moved at a time."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 1200, generator=generator)
    surgeon = Surgeon(torch.randn(3, 1200, generator=generator), statistics_of(x))
    left = torch.randperm(1200, generator=generator)[:700].sort().values
    wanted, weight = surgeon.block(left).clone(), surgeon.weight[left].clone()
    surgeon.keep(left)
    everything = torch.arange(700)
    assert (
        torch.equal(surgeon.block(everything), wanted)
        and torch.equal(surgeon.rows(everything), wanted)
        and torch.equal(surgeon.weight, weight)
    )
    assert surgeon.inverse.is_contiguous() and torch.equal(wanted, wanted.T)


def test_many_columns_that_are_nearly_one() -> None:
    """One direction owns nearly all of 512 columns, far more of them than tokens: nothing fails, nothing is negative."""
    torch.manual_seed(0)
    x = torch.randn(40, 1) + 1e-3 * torch.randn(40, 512)
    surgeon = Surgeon(torch.randn(16, 512), statistics_of(x))
    found = eliminate_channels(surgeon, 512)
    assert sorted(found.order.tolist()) == list(range(512)) and found.costs.isfinite().all() and (found.costs >= 0).all()


@torch.no_grad()
def test_of_real_activations_less_is_missed_than_by_the_papers_choice(
    stories: PreTrainedModel, token_ids: torch.Tensor
) -> None:
    from slimllm import PruneConfig, prune_model
    from slimllm.evaluation.perplexity import load

    errors = {}
    for criterion in ("slimllm", "obs", "random"):
        model, _ = load(stories.config.name_or_path)
        config = PruneConfig(
            ratio=0.4, criterion=criterion, recovery="lstsq", allocation="uniform", calibration=token_ids, round_to=1
        )
        report = prune_model(model, token_ids, config)
        errors[criterion] = report.layers[0]["ffn_error_after"], report.layers[0]["attention_error_after"]
    assert errors["obs"][0] < 0.9 * errors["slimllm"][0] and errors["obs"][0] < 0.7 * errors["random"][0]
    assert errors["obs"][1] <= errors["slimllm"][1] and errors["obs"][1] <= errors["random"][1]
