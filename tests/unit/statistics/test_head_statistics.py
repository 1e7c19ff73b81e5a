"""Heads' covariances streamed from tokens, and when the engine takes them in place of the Gram."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORIES, config, contents, stop_at
from tiny_models import tiny

import slimllm
from slimllm import ops
from slimllm.methods.recovery import Recovery
from slimllm.plugins import RECOVERIES
from slimllm.pruning.shapes import streams_heads
from slimllm.statistics import GramStatistics, HeadStatistics

HEADS, WIDTH, OUTPUTS = 4, 6, 10


def plain(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """C in fp64, from all contributions at once."""
    by_head = weight.double().view(len(weight), HEADS, -1)
    parts = torch.einsum("nhd,khd->hnk", x.double().view(len(x), HEADS, -1), by_head)
    parts = parts - parts.mean(1, keepdim=True)
    return torch.einsum("ink,jnk->ijk", parts, parts) / len(x)


@pytest.fixture(params=["plain", "far from zero", "real"])
def case(request: pytest.FixtureRequest, token_ids: torch.Tensor, stories: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (D, H·d) and tokens."""
    if request.param == "real":
        found: list[torch.Tensor] = []
        projection = stories.model.layers[2].self_attn.o_proj
        hook = projection.register_forward_pre_hook(lambda module, args: found.append(args[0].flatten(0, 1)))
        with torch.no_grad():
            stories(token_ids[:4])
        hook.remove()
        return projection.weight.detach(), found[0]
    torch.manual_seed(0)
    weight, x = torch.randn(OUTPUTS, HEADS * WIDTH), torch.randn(90, HEADS * WIDTH)
    return weight, x + 1e3 if request.param == "far from zero" else x


def streamed(weight: torch.Tensor, *batches: torch.Tensor) -> HeadStatistics:
    statistics = HeadStatistics(weight, HEADS)
    for batch in batches:
        statistics.update(batch)
    return statistics


def test_against_fp64_in_any_split(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, x = case
    wanted = plain(weight, x)
    whole, parts = streamed(weight, x), streamed(weight, x[:1], x[1:1], x[1:50], x[50:])
    merged = streamed(weight, x[:7])
    merged.merge(streamed(weight, x[7:]))
    moved = streamed(weight, x[:30])
    moved.move(moved.pivot + 0.5 * x.std(0))
    moved.update(x[30:])
    scale = torch.einsum("iik->i", wanted).sqrt()  # the spread of every head's contributions, over all outputs
    for statistics in (whole, parts, merged, moved):
        error = (statistics.head_covariance() - wanted).abs().sum(-1) / (scale[:, None] * scale)
        assert float(error.max()) < 1e-5
        assert torch.allclose(statistics.mean(), x.double().mean(0), rtol=1e-6, atol=1e-6)
        assert torch.allclose(statistics.variance(), x.double().var(0, correction=0), rtol=1e-4, atol=1e-6)
    gram = GramStatistics(x.shape[1])
    gram.update(x)
    assert torch.allclose(whole.head_covariance(), ops.head_covariance(weight, gram.covariance(), HEADS), atol=1e-4)


def test_what_it_refuses() -> None:
    statistics = HeadStatistics(torch.randn(OUTPUTS, HEADS * WIDTH), HEADS)
    with pytest.raises(ValueError, match="no tokens"):
        statistics.head_covariance()
    with pytest.raises(ValueError, match="take no token weights"):
        statistics.update(torch.randn(3, HEADS * WIDTH), torch.ones(3))
    with pytest.raises(ValueError, match="must have shape"):
        statistics.update(torch.randn(3, 5))


def test_the_choice_by_counted_cost() -> None:
    """At 32 heads of 128 up to 1567 tokens in one batch, as the docstring of the operation counts; not in small batches."""
    shape, cpu = torch.Size([4096, 4096]), torch.device("cpu")
    default = slimllm.PruneConfig(0.2, "slimllm")
    assert streams_heads(default, (1567, 1), shape, 32, cpu) and not streams_heads(default, (1568, 1), shape, 32, cpu)
    assert not streams_heads(default, (512, 16), shape, 32, cpu)
    for other in (
        {"preset": "paper"},
        {"preset": "best"},
        {"token_weights": "norm"},
        {"recovery": "lstsq"},
        {"criterion": "obs"},
    ):
        assert not streams_heads(
            slimllm.PruneConfig(**{"ratio": 0.2, "preset": "slimllm", **other}), (100, 1), shape, 32, cpu
        )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"head_unit": "query"},
        {"criterion": "wanda-sp", "recovery": "bias"},
        {"criterion": "magnitude", "recovery": "none"},
        {"criterion": "magnitude"},
    ],
)
def test_the_same_result_either_way(
    settings: dict[str, Any], token_ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of few tokens; `heads` and `gram` differ in the last digits alone."""
    few = config(token_ids[:1, :20], ratio=0.4, **settings)
    monkeypatch.setattr("slimllm.pruning.streaming.streams_heads", lambda *given: True)
    by_heads = slimllm.prune(STORIES, tmp_path / "heads", few)
    monkeypatch.setattr("slimllm.pruning.streaming.streams_heads", lambda *given: False)
    by_gram = slimllm.prune(STORIES, tmp_path / "gram", few)
    pruned = [layer for layer in by_heads.layers if "attention_statistics" in layer]
    assert pruned and {layer["attention_statistics"] for layer in pruned} == {"heads"}
    for one, other in zip(by_heads.layers, by_gram.layers):
        assert other.get("attention_statistics", "gram") == "gram"
        for name in ("kept_heads", "kept_channels"):
            assert one[name] == other[name]  # type: ignore[literal-required]
        if "attention_error_after" in one:
            assert one["attention_error_after"] == pytest.approx(other["attention_error_after"], rel=1e-3, abs=1e-6)
    models = [slimllm.load(tmp_path / name, device="cpu")[0] for name in ("heads", "gram")]
    logits = [model(token_ids[:2]).logits for model in models]
    assert torch.allclose(*logits, atol=2e-3)


def test_post_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gain of the norm after attention scales the covariances of what the residual stream sees."""
    torch.manual_seed(1)
    windows = torch.randint(96, (1, 20))
    importance = []
    for chosen in (lambda *given: True, lambda *given: False):
        model = tiny("gemma2")
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.data.copy_(torch.linspace(-0.5, 1.5, model.config.hidden_size))
        monkeypatch.setattr("slimllm.pruning.streaming.streams_heads", chosen)
        report = slimllm.prune_model(model, windows, slimllm.PruneConfig(0.3, "slimllm"))
        importance.append([layer["head_importance"] for layer in report.layers if "head_importance" in layer])
    assert importance[0] and importance[0] == [pytest.approx(one, rel=1e-4) for one in importance[1]]


def test_the_gram_is_for_those_who_ask_for_it(
    forgotten: None, token_ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the statistics are streamed: the same method fails alike on few tokens and on many."""

    @RECOVERIES.register("careless")
    class Careless(RECOVERIES.all()["none"]):  # type: ignore[misc]
        attention_gram = False

        def fit(self, sublayer: Any, statistics: Any, kept: torch.Tensor) -> Any:
            statistics.gram.mean()
            return super().fit(sublayer, statistics, kept)

    assert Recovery.attention_gram
    for chosen in (True, False):
        monkeypatch.setattr("slimllm.pruning.streaming.streams_heads", lambda *given, chosen=chosen: chosen)
        with pytest.raises(slimllm.InputError, match="attention_gram = True"):
            slimllm.prune(STORIES, tmp_path / "out", config(token_ids, recovery="careless"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Of the numbers as they are: sums are in fp32 and fp64."""
    torch.manual_seed(2)
    weight, x = torch.randn(OUTPUTS, HEADS * WIDTH).to(dtype), (torch.randn(80, HEADS * WIDTH) + 20).to(dtype)
    found = streamed(weight, *x.split(11)).head_covariance()
    assert torch.allclose(found, plain(weight, x), rtol=1e-3, atol=1e-3)


def test_what_does_not_fit_together_is_left_as_it_was() -> None:
    weight = torch.randn(OUTPUTS, HEADS * WIDTH)
    for wrong, heads in ((weight, 5), (weight, 0), (weight[0], 4)):
        with pytest.raises(ValueError, match="divisible by num_heads"):
            HeadStatistics(wrong, heads)
    x = torch.randn(5, HEADS * WIDTH)
    statistics = streamed(weight, x)
    before = statistics.head_covariance()
    for other in (HeadStatistics(weight, 2), HeadStatistics(weight[:1], HEADS), HeadStatistics(weight + 1, HEADS)):
        other.update(x)
        with pytest.raises(ValueError, match="of other heads or of another weight"):
            statistics.merge(other)
    assert statistics.count == 5 and torch.equal(statistics.head_covariance(), before)


def test_resumed(token_ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimllm.pruning.streaming.streams_heads", lambda *given: True)
    settings = config(token_ids[:2, :20], ratio=0.4)
    slimllm.prune(STORIES, tmp_path / "whole", settings, command="the command")
    with pytest.raises(KeyboardInterrupt):
        slimllm.prune(STORIES, tmp_path / "out", settings, progress=stop_at("prune", 2), command="the command")
    slimllm.prune(STORIES, tmp_path / "out", settings, resume=True, command="the command")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
