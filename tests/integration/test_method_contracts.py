"""What the engine asks of a method, gives it, and refuses of it: criteria, recoveries and allocations made here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORIES, config

import slimllm
from slimllm import InputError
from slimllm.methods.allocation import (
    Allocation,
    DenseSublayer,
    LayerRemoval,
    Removals,
    Request,
    register_allocation,
    spend_at_least_cost,
)
from slimllm.methods.criteria import Criterion, register_criterion
from slimllm.methods.recovery import Fit, Recovery, register_recovery
from slimllm.methods.selection import Selection
from slimllm.methods.statistics import Needs, SublayerStatistics
from slimllm.models.slicing import OutputChange
from slimllm.models.sublayer import Sublayer


@pytest.mark.parametrize("recovery", ["affine", "lstsq"])
def test_a_criterion_that_chooses_jointly(forgotten: None, recovery: str, token_ids: torch.Tensor, tmp_path: Path) -> None:
    @register_criterion("the-first")
    class TheFirst(Criterion):
        """The first units of every group stay."""

        needs = Needs.OUTPUT_GRAM

        def select(self, sublayer: Sublayer, statistics: SublayerStatistics, num_removed: int) -> Selection:
            assert statistics.output_covariance().shape == (64, 64)
            numbers = torch.arange(sublayer.units).view(sublayer.groups, -1)
            return Selection(numbers[:, : numbers.shape[1] - num_removed].flatten(), torch.zeros(sublayer.units))

    settings: dict[str, Any] = {"criterion": TheFirst(), "recovery": recovery, "head_unit": "query"}
    report = slimllm.prune(STORIES, tmp_path / "out", config(token_ids, **settings))
    for layer in report.layers:
        assert layer["kept_channels"] == list(range(layer["intermediate_size"]))
        per_group = layer["num_heads"] // 4
        assert layer["kept_heads"] == [2 * group + head for group in range(4) for head in range(per_group)]


def test_a_recovery(forgotten: None, token_ids: torch.Tensor, tmp_path: Path) -> None:
    @register_recovery("half-bias")
    class HalfBias(Recovery):
        """Half of the mean of what is removed."""

        def fit(self, sublayer: Sublayer, statistics: SublayerStatistics, kept: torch.Tensor) -> Fit:
            moments = statistics.moments(kept)
            half = (moments.mean_y - moments.mean_y_hat) / 2
            return Fit.of_moments(moments, torch.ones_like(half), half)

    for name in ("bias", "half-bias"):
        slimllm.prune(STORIES, tmp_path / name, config(token_ids, recovery=name))
    whole, half = (slimllm.load(tmp_path / name, device="cpu")[0].model.layers[0] for name in ("bias", "half-bias"))
    for module in ("self_attn.o_proj", "mlp.down_proj"):
        biases = [layer.get_submodule(module).bias for layer in (whole, half)]
        if biases[0] is not None and module == "self_attn.o_proj":  # the FFN's input depends on the attention's
            torch.testing.assert_close(biases[1], biases[0] / 2, rtol=1e-5, atol=1e-8)


def test_a_recovery_that_says_too_little(forgotten: None, token_ids: torch.Tensor, tmp_path: Path) -> None:
    @register_recovery("secret")
    class Secret(Recovery):
        """Changes single weights of the FFN without having asked for the Gram."""

        def fit(self, sublayer: Sublayer, statistics: SublayerStatistics, kept: torch.Tensor) -> Fit:
            outputs = sublayer.output_projection.out_features
            change = OutputChange(torch.zeros(outputs), delta=torch.zeros(outputs, len(kept) * sublayer.width))
            return Fit(change, 0.0, 0.0)

    with pytest.raises(ValueError, match=r"has to declare Needs\.COLUMN_GRAM"):
        slimllm.prune(STORIES, tmp_path / "out", config(token_ids, recovery="secret"))
    Secret.fit = lambda *given: Fit(None, 0.5, None)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"must be finite, or both None, got 0\.5 and None"):
        slimllm.prune(STORIES, tmp_path / "out", config(token_ids, recovery="secret"))
    assert not (tmp_path / "out").exists()


def test_statistics_of_the_dense_model(forgotten: None, token_ids: torch.Tensor, tmp_path: Path) -> None:
    """Methods that take them get columns and means, and nothing that would need a Gram."""

    class ByInputs(Criterion):
        """Channels by their means, which the inputs of the FFN accompany."""

        attention_gram = False
        dense_statistics = True

        def scores(self, sublayer: Sublayer, statistics: SublayerStatistics) -> torch.Tensor:
            if not sublayer.is_attention:
                assert statistics.inputs.mean().shape == (64,) and statistics.inputs.count == 16 * 64
            return statistics.columns.mean().abs().view(sublayer.units, -1).sum(1)

    register_criterion("by-inputs")(ByInputs)

    @register_recovery("too-much")
    class TooMuch(Recovery):
        """Asks for more than means."""

        attention_gram = False
        dense_statistics = True

        def fit(self, sublayer: Sublayer, statistics: SublayerStatistics, kept: torch.Tensor) -> Fit:
            return Fit.of_moments(statistics.moments(kept), *statistics.moments(kept).affine_fit())

    report = slimllm.prune(STORIES, tmp_path / "out", config(token_ids, criterion="by-inputs", recovery="bias"))
    assert report.config["one_pass"] and not any("ffn_error_after" in layer for layer in report.layers)
    with pytest.raises(InputError, match=r"with statistics of the dense model, only the means .*`output_means`"):
        slimllm.prune(STORIES, tmp_path / "more", config(token_ids, criterion="by-inputs", recovery="too-much"))
    ByInputs.scores = lambda self, sublayer, statistics: statistics.unit_covariance()  # type: ignore[assignment]
    with pytest.raises(InputError, match="there are no covariances of the heads; use `columns`"):
        slimllm.prune(STORIES, tmp_path / "more", config(token_ids, criterion="by-inputs", recovery="bias"))
    ByInputs.needs = Needs.OUTPUT_GRAM
    with pytest.raises(
        InputError, match=r"by-inputs has dense_statistics, so it must have attention_gram = False and needs"
    ):
        config(token_ids, criterion="by-inputs", recovery="bias")


def test_an_allocation(forgotten: None, token_ids: torch.Tensor, tmp_path: Path) -> None:
    @register_allocation("smallest-weights")
    class SmallestWeights(Allocation):
        """A unit costs the square of its weights."""

        needs = Needs.COLUMNS

        def costs(self, dense: DenseSublayer) -> torch.Tensor:
            weight = dense.sublayer.output_projection.weight.double()
            by_unit = weight.square().sum(0).view(dense.sublayer.groups, dense.sublayer.units // dense.sublayer.groups, -1)
            return by_unit.sum(2).sort(1).values.sum(0)

        def allocate(self, request: Request) -> Removals:
            return spend_at_least_cost(request)

    report = slimllm.prune(STORIES, tmp_path / "out", config(token_ids, allocation="smallest-weights"))
    slimllm.prune(STORIES, tmp_path / "query", config(token_ids, allocation="smallest-weights", head_unit="query"))
    assert report.achieved_ratio == pytest.approx(0.3, rel=0.005)
    assert len({layer["intermediate_size"] for layer in report.layers}) > 1
    with pytest.raises(InputError, match=r"The method incomplete failed in measuring .*has to define costs\(\)"):
        incomplete = dataclasses.replace(config(token_ids), allocation=_incomplete())
        slimllm.prune(STORIES, tmp_path / "other", incomplete)


def _incomplete() -> Allocation:
    @register_allocation("incomplete")
    class Incomplete(Allocation):
        """Measures nothing."""

        needs = Needs.COLUMNS

        def allocate(self, request: Request) -> Removals:
            return spend_at_least_cost(request)

    return Incomplete()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_no_numbers(forgotten: None, bad: float, token_ids: torch.Tensor, tmp_path: Path) -> None:
    @register_criterion("bad")
    class Bad(Criterion):
        """A score that is not a number."""

        def scores(self, sublayer: Sublayer, statistics: SublayerStatistics) -> torch.Tensor:
            return torch.full((sublayer.units,), bad)

    with pytest.raises(InputError, match=r"method bad failed in the attention of layer \d .*scores of .* must be finite"):
        slimllm.prune(STORIES, tmp_path / "out", config(token_ids, criterion="bad"))


WRONG = {
    "too many": lambda kept, importance: (kept[1:], importance),
    "twice": lambda kept, importance: (torch.cat([kept[:1], kept[:-1]]), importance),
    "of another group": lambda kept, importance: (torch.arange(len(kept)), importance),
    "a mask": lambda kept, importance: (kept > 0, importance),
    "beyond": lambda kept, importance: (kept + len(importance), importance),
    "importance of another length": lambda kept, importance: (kept, importance[1:]),
    "no numbers": lambda kept, importance: (kept, importance * torch.nan),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_choices_that_cannot_be(forgotten: None, wrong: str, token_ids: torch.Tensor, tmp_path: Path) -> None:
    """Each of them would make another model than the one that is reported."""

    @register_criterion("wrong")
    class Wrong(Criterion):
        """A choice that is none."""

        def select(self, sublayer: Sublayer, statistics: SublayerStatistics, num_removed: int) -> Selection:
            numbers = torch.arange(sublayer.units).view(sublayer.groups, -1)
            kept = numbers[:, num_removed:].flatten()
            return Selection(*WRONG[wrong](kept, torch.ones(sublayer.units)))

    with pytest.raises(InputError, match=r"The method wrong failed in the attention of layer \d"):
        slimllm.prune(STORIES, tmp_path / "out", config(token_ids, ratio=0.5, criterion="wrong", head_unit="query"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "adds_bias", "sentence"),
    [
        ({"intercept": torch.ones(64)}, False, "declare adds_bias = True"),
        ({"intercept": torch.ones(63)}, True, r"intercept must be finite and of shape \(64,\), got shape \(63,\)"),
        ({"slope": torch.full((64,), torch.nan)}, True, "slope must be finite"),
    ],
)
def test_changes_that_cannot_be(
    forgotten: None,
    change: dict[str, torch.Tensor],
    adds_bias: bool,
    sentence: str,
    token_ids: torch.Tensor,
    tmp_path: Path,
) -> None:
    recovery = _constant(OutputChange(**change), adds_bias)
    with pytest.raises(InputError, match=sentence):
        slimllm.prune(STORIES, tmp_path / "out", config(token_ids, recovery=recovery))


def _constant(change: OutputChange | None, bias: bool) -> Recovery:
    @register_recovery("constant")
    class Constant(Recovery):
        """The same change everywhere."""

        adds_bias = bias

        def fit(self, sublayer: Sublayer, statistics: SublayerStatistics, kept: torch.Tensor) -> Fit:
            error = statistics.moments(kept).error_of_removal()
            return Fit(change, error, error)

    return Constant()


@pytest.mark.parametrize(("change", "bias"), [(OutputChange(slope=torch.full((64,), 0.5)), False), (None, True)])
def test_what_is_written_is_what_was_fitted(
    forgotten: None, change: OutputChange | None, bias: bool, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    """A slope makes no bias, and a bias that was promised is there, of zeros."""
    settings = config(token_ids, recovery=_constant(change, bias), allocation="uniform")
    slimllm.prune(STORIES, tmp_path / "out", settings)
    slimllm.prune(STORIES, tmp_path / "plain", config(token_ids, recovery="none", allocation="uniform"))
    model, plain = (slimllm.load(tmp_path / name, device="cpu")[0].model.layers[0] for name in ("out", "plain"))
    factor = 1.0 if change is None else 0.5
    torch.testing.assert_close(model.self_attn.o_proj.weight, factor * plain.self_attn.o_proj.weight)
    biases = [module.bias for module in (model.self_attn.o_proj, model.mlp.down_proj)]
    assert all((one is not None) == bias and (one is None or not one.any()) for one in biases)


@pytest.mark.parametrize("what", ["layers", "units", "channels"])
def test_removals_that_cannot_be(forgotten: None, what: str, token_ids: torch.Tensor, tmp_path: Path) -> None:
    @register_allocation("generous")
    class Generous(Allocation):
        """More than there is."""

        def allocate(self, request: Request) -> Removals:
            number = len(request.shapes) - (what == "layers")
            units = request.shapes[0].units if what == "units" else 0
            channels = 1 if what == "channels" else 0
            return Removals([LayerRemoval(0.2, units, channels)] * number, number)

    with pytest.raises(InputError, match="llocation generous"):
        slimllm.prune(STORIES, tmp_path / "out", config(token_ids, allocation=Generous(), round_to=4))


def test_only_what_was_declared(forgotten: None, token_ids: torch.Tensor, tmp_path: Path) -> None:
    """Also where another method of the run needs more."""

    @register_criterion("silent")
    class Silent(Criterion):
        """Uses the Gram without having asked for it."""

        def scores(self, sublayer: Sublayer, statistics: SublayerStatistics) -> torch.Tensor:
            return statistics.gram.variance().view(sublayer.units, -1).sum(1)

    for recovery in ("affine", "lstsq"):
        with pytest.raises(InputError, match=r"method that declares Needs\.COLUMN_GRAM"):
            slimllm.prune(STORIES, tmp_path / "out", config(token_ids, criterion="silent", recovery=recovery))
