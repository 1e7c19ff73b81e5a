from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from commands import call

from slimllm import InputError, PruneConfig, perplexity, prune
from slimllm.calibration import bundled_text, tokenize
from slimllm.checkpoints.opening import open_checkpoint
from slimllm.evaluation.perplexity import load
from slimllm.experiments.compare import Compared, compare
from slimllm.experiments.methods import METHODS, row_of, rows_of


@pytest.fixture(scope="module")
def held_out(stories_path: Path) -> torch.Tensor:
    return tokenize(open_checkpoint(stories_path).tokenizer(), [bundled_text("evaluation")[:20_000]])


def test_lines_are_what_single_runs_give(
    stories_path: Path, token_ids: torch.Tensor, held_out: torch.Tensor, tmp_path: Path
) -> None:
    config = PruneConfig(0.5, "slimllm", calibration=token_ids)
    seen: list[Compared] = []
    methods = ["random", "slimllm", "flap", "best"]
    lines = compare(stories_path, [0.2, 0.4], config, held_out, methods=methods, max_windows=16, on_line=seen.append)
    assert seen == lines and lines[0].method == "dense"
    assert {(line.method, line.ratio) for line in lines[1:]} == {(m, r) for m in methods for r in (0.2, 0.4)}
    dense = perplexity(load(stories_path)[0], held_out, max_windows=16)
    assert lines[0].perplexity == pytest.approx(dense, rel=1e-6)
    for name, ratio in (("best", 0.4), ("flap", 0.2), ("random", 0.4)):
        line = next(line for line in lines if (line.method, line.ratio) == (name, ratio))
        report = prune(stories_path, tmp_path / name, PruneConfig(ratio=ratio, calibration=token_ids, **METHODS[name]))
        assert line.parameters == report.parameters["after"]
        assert line.perplexity == pytest.approx(perplexity(load(tmp_path / name)[0], held_out, max_windows=16), rel=1e-5)
        assert line.log_increase == pytest.approx(math.log(line.perplexity / dense))
    # One dense pass for each measured allocation, and one on fewer windows for the others.
    assert [line.method for line in lines if not line.shared] == ["dense", "best", "flap", "slimllm"]


def test_settings_of_the_caller_do_not_leak_into_the_methods(
    stories_path: Path, token_ids: torch.Tensor, held_out: torch.Tensor
) -> None:
    config = PruneConfig(ratio=0.5, calibration=token_ids, preset="best")
    plain = PruneConfig(0.5, "slimllm", calibration=token_ids)
    values = [
        compare(stories_path, [0.3], one, held_out, methods=["slimllm"], max_windows=4)[1].perplexity
        for one in (config, plain)
    ]
    assert values[0] == values[1]


def test_what_cannot_be_compared(stories_path: Path, token_ids: torch.Tensor, held_out: torch.Tensor) -> None:
    config = PruneConfig(0.5, "slimllm", calibration=token_ids)
    with pytest.raises(InputError, match=r"'gtpq' is not a method\. Give one of best, "):
        compare(stories_path, [0.2], config, held_out, methods=["gtpq"])
    with pytest.raises(InputError, match=r"is not a method\. Did you mean wanda-sp\?"):
        compare(stories_path, [0.2], config, held_out, methods=["Wanda_SP"])
    with pytest.raises(InputError, match="at least one method and one ratio"):
        compare(stories_path, [], config, held_out)


def test_the_command(stories_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "lines.jsonl"
    arguments = ["compare", stories_path, "--ratio", "0.2", "--method", "best", "--method", "slimllm", "--samples", "8"]
    code, printed, errors = call(capsys, *arguments, "--max-windows", "8", "--out", out)
    assert code == 0, errors
    assert "perplexity" in printed and "best" in printed and "slimllm" in printed
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["method"] for line in lines] == ["dense", "best", "slimllm"]
    code, _, errors = call(capsys, *arguments, "--out", out)
    assert code == 2 and "exists already" in errors
    code, _, errors = call(capsys, "compare", stories_path, "--method", "gptq")
    assert code == 2 and "is not a method" in errors


def test_names_of_methods() -> None:
    """A name of the table with or without spaces, a preset, or methods joined: what is not named is the default's."""
    assert row_of("wanda-sp+lstsq") == row_of("wanda-sp + lstsq") == METHODS["wanda-sp + lstsq"]
    assert row_of("paper") == {"preset": "paper"}
    assert row_of("flap+none") == {**METHODS["flap"], "recovery": "none"}
    assert row_of("best+affine") == {"preset": "best", "recovery": "affine"} and row_of("obs") == {"criterion": "obs"}
    assert row_of("obs+uniform") == {"criterion": "obs", "allocation": "uniform"}
    assert row_of("random+flap + bias") == {
        "preset": "slimllm",
        "criterion": "random",
        "allocation": "flap",
        "recovery": "bias",
    }
    assert list(rows_of(["obs+bias", "obs + bias", "best"])) == ["obs + bias", "best"]
    for wrong in ("", "obs+obs", "obs+random", "random+obs", "obs+", "obs lstsq"):
        with pytest.raises(InputError, match="is not a method"):
            row_of(wrong)
    with pytest.raises(
        InputError, match="The method 'none' cannot run: criterion obs removes what a recovery can make up for"
    ):
        row_of("none")


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ({"x": {"ratio": 0.2}}, "sets ratio; a method may set preset, criterion"),
        ({"x": {"samples": 1}}, "sets samples"),
        ({"..": {}}, "cannot be the name"),
        ({"a/b": {}}, "cannot be the name"),
        ({"dense": {}}, "cannot be the name"),
    ],
)
def test_rows_that_cannot_be(rows: dict[str, dict[str, object]], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        rows_of(rows)


def test_the_windows_of_the_preset_paper_are_its_own(stories_path: Path, held_out: torch.Tensor) -> None:
    """Whatever else is in the table: it draws them without BOS, from other places."""
    config = PruneConfig(0.3, "slimllm", samples=8, seq_len=32)
    alone, _, beside = (
        {line.method: line.perplexity for line in compare(stories_path, [0.3], config, held_out, methods=m, max_windows=4)}
        for m in (["paper"], ["magnitude"], ["magnitude", "paper"])
    )
    assert beside["paper"] == alone["paper"] and list(beside) == ["dense", "magnitude", "paper"]
