"""Heads kept in multiples, and what tensor parallelism can make of a pruned model."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call
from conftest import config, logits, random_llama
from rich.console import Console
from transformers import AutoModelForCausalLM

import slimllm
from slimllm import InputError, PruneConfig, PruneReport
from slimllm.cli.display import print_summary
from slimllm.methods.allocation.layer_importance import LayerImportance
from slimllm.pruning.tensor_parallel import tensor_parallel_line, tensor_parallel_of, tensor_parallel_sizes


@pytest.mark.parametrize(
    ("layers", "sizes"),
    [
        ([(32, 8, 1024)], [2, 4, 8, 16, 32]),  # each KV head on two or four devices
        ([(32, 8, 1024), (24, 6, 1024)], [2]),  # 4 and 8 are not a multiple of 6, nor divide it
        ([(12, 12, 96), (6, 6, 96)], [2, 3, 6]),
        ([(32, 8, 1024), (32, 8, 1023)], []),
        ([(32, 8, 1024), (28, 7, 1024)], []),
        ([(8, 1, 64), (4, 1, 64)], [2, 4]),
        ([(1, 1, 64)], []),
        ([(6, 2, 60)], [2, 6]),  # three devices cannot share two KV heads evenly
    ],
)
def test_sizes_that_divide_every_layer(layers: list[tuple[int, int, int]], sizes: list[int]) -> None:
    assert tensor_parallel_sizes(layers) == sizes


def test_the_line() -> None:
    assert tensor_parallel_line([2, 4]) == "tensor parallel: 2, 4"
    assert tensor_parallel_line([]) == "tensor parallel: one device only"


@pytest.mark.parametrize("allocation", ["layer-importance", "uniform", "auto", "flap"])
def test_kv_heads_of_a_pruned_model(stories_path: Path, token_ids: torch.Tensor, tmp_path: Path, allocation: str) -> None:
    """8 heads in 4 KV groups: every layer keeps 2 or 4 of them, and half of a layer's heads really go somewhere."""
    settings = config(token_ids, ratio=0.4, allocation=allocation, heads_multiple_of=2)
    report = slimllm.prune(stories_path, tmp_path / "out", settings)
    assert {layer["num_kv_heads"] for layer in report.layers} <= {2, 4}
    assert min(layer["num_kv_heads"] for layer in report.layers) == 2
    assert all(layer["num_heads"] == 2 * layer["num_kv_heads"] for layer in report.layers)
    assert report.achieved_ratio == pytest.approx(0.4, rel=0.005 if allocation != "uniform" else 0.01)
    saved = PruneReport.read(tmp_path / "out")
    assert saved.config["heads_multiple_of"] == 2 and saved.identity["heads_multiple_of"] == 2
    assert saved.tensor_parallel == report.tensor_parallel and 2 in saved.tensor_parallel
    model, _ = slimllm.load(tmp_path / "out", device="cpu")
    assert torch.isfinite(logits(model, token_ids[:1])).all()


@pytest.mark.parametrize(
    ("head_unit", "kv_heads", "multiple_of", "counted"),
    [
        ("kv-group", 6, 2, "num_kv_heads"),
        ("kv-group", 6, 3, "num_kv_heads"),
        ("query", 3, 2, "num_heads"),
        ("query", 2, 3, "num_heads"),
        ("query", 6, 2, "num_kv_heads"),
    ],
)
def test_heads_of_a_random_model(head_unit: str, kv_heads: int, multiple_of: int, counted: str) -> None:
    """12 query heads; where every group has one, `query` is `kv-group`."""
    model = random_llama(1, num_attention_heads=12 if kv_heads < 6 else 6, num_key_value_heads=kv_heads)
    ids = torch.randint(0, 128, (6, 40), generator=torch.Generator().manual_seed(0))
    settings = PruneConfig(0.5, "slimllm", head_unit=head_unit, heads_multiple_of=multiple_of, allocation="uniform")
    report = slimllm.prune_model(model, ids, settings)
    assert {layer[counted] % multiple_of for layer in report.layers} == {0}
    assert all(multiple_of <= layer["num_heads"] < layer["num_heads_before"] for layer in report.layers)
    assert report.achieved_ratio == pytest.approx(0.5, rel=0.02)
    assert multiple_of in report.tensor_parallel or head_unit == "query"
    assert all(len(layer["kept_heads"]) == layer["num_heads"] for layer in report.layers)


def test_what_cannot_be_is_refused_early(
    stories_path: Path,
    token_ids: torch.Tensor,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before any tensor is read, and by `slimllm plan` too."""
    from slimllm.checkpoints.safetensors import SafetensorsCheckpoint

    def unread(self: SafetensorsCheckpoint, names: list[str]) -> Any:
        raise AssertionError(names)

    monkeypatch.setattr(SafetensorsCheckpoint, "_read", unread)
    words = "heads_multiple_of is 3, but a layer of the model has 4 KV heads"
    with pytest.raises(InputError, match=words):
        slimllm.prune(stories_path, tmp_path / "out", config(token_ids, heads_multiple_of=3))
    assert not list(tmp_path.iterdir())
    assert call(capsys, "plan", stories_path, "--device", "cuda", "--heads-multiple-of", "2")[0] == 0
    code, _, err = call(capsys, "plan", stories_path, "--heads-multiple-of", "3")
    assert code == 2 and words in err


def test_the_paper_has_no_such_rule() -> None:
    with pytest.raises(InputError, match="heads_multiple_of 2 is not the paper's"):
        PruneConfig(ratio=0.2, preset="paper", heads_multiple_of=2)
    assert PruneConfig(ratio=0.2, preset="paper", heads_multiple_of=1).to_dict()["heads_multiple_of"] == 1


def summary(report: PruneReport) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_summary(console, report)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_advice_that_is_true(stories_path: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    """What the summary and the model card advise makes the model what it promises."""
    settings = {"ratio": 0.35, "allocation": LayerImportance(alpha=20.0)}
    report = slimllm.prune(stories_path, tmp_path / "out", config(token_ids, **settings))
    advice = "ensor parallel: one device only; prune with --heads-multiple-of 2 to allow 2"
    assert report.tensor_parallel == [] and "t" + advice in summary(report).splitlines()
    assert "T" + advice in (tmp_path / "out" / "README.md").read_text()
    better = slimllm.prune(stories_path, tmp_path / "better", config(token_ids, heads_multiple_of=2, **settings))
    assert "tensor parallel: 2" in summary(better).splitlines()[-2] and "only" not in summary(better)
    assert json.loads((tmp_path / "better" / "report.json").read_text())["tensor_parallel"] == better.tensor_parallel
    assert better.achieved_ratio == pytest.approx(0.35, rel=0.005)
    AutoModelForCausalLM.from_pretrained(tmp_path / "better", trust_remote_code=True)


@pytest.mark.parametrize(
    ("before", "settings", "advice"),
    [
        ((8, 4, 64), {}, 2),
        ((8, 4, 64), {"heads_multiple_of": 2}, 4),  # 2 was not enough, as it were
        ((8, 4, 64), {"round_to": 3}, None),  # widths would not divide
        ((8, 4, 64), {"round_to": 6}, 2),
        ((8, 4, 65), {}, None),  # nor could it be split before
        ((9, 3, 99), {}, 3),
        ((8, 1, 64), {}, None),  # the one KV head stays, whatever the multiple
        ((8, 1, 64), {"head_unit": "query"}, 2),
        ((8, 4, 64), {"preset": "paper"}, None),  # which refuses the option
    ],
)
def test_advice_only_where_it_helps(before: tuple[int, int, int], settings: dict[str, Any], advice: int | None) -> None:
    names = ("num_heads_before", "num_kv_heads_before", "intermediate_size_before")
    report = PruneReport.__new__(PruneReport)
    report.config = PruneConfig(ratio=0.2, **settings).to_dict()
    report.layers, report.tensor_parallel = [dict(zip(names, before))], []
    tail = "" if advice is None else f"; prune with --heads-multiple-of {advice} to allow {advice}"
    assert tensor_parallel_of(report) == "tensor parallel: one device only" + tail
