"""The methods in examples/, which people copy: pruned with, from the command line and from Python."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call
from conftest import STORIES, config

import slimllm
from slimllm.experiments.bench import Setting, measure
from slimllm.plugins import CRITERIA, import_plugin

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = {"wanda_sp": "my-wanda-sp", "flap": "my-flap", "own_score": "own-score"}


@pytest.mark.parametrize(("file", "name"), NAMES.items())
def test_as_its_docstring_says(
    forgotten: None, file: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (EXAMPLES / f"{file}.py").read_text()
    assert sum(bool(line.strip()) for line in text.split('"""', 2)[2].splitlines()) <= 30
    described = str(ast.get_docstring(ast.parse(text))).replace("\\\n", " ")
    command = re.search(r"^slimllm (prune MODEL.*)$", described, re.MULTILINE)
    assert command is not None
    words = command[1].replace("MODEL", str(STORIES)).replace("OUT", str(tmp_path / "out"))
    words = words.replace("examples/", f"{EXAMPLES}/").split()
    code, _, err = call(capsys, *words, "--samples", "4", "--quiet")
    assert code == 0, err
    report = slimllm.PruneReport.read(tmp_path / "out")
    assert report.config["criterion"] == name and report.achieved_ratio == pytest.approx(0.2, rel=0.01)
    assert f"criterion {name}" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(("file", "theirs"), [("wanda_sp", "wanda-sp"), ("flap", "flap")])
@pytest.mark.parametrize("head_unit", ["kv-group", "query"])
def test_they_choose_as_the_methods_of_those_names(
    forgotten: None, file: str, theirs: str, head_unit: str, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    import_plugin(str(EXAMPLES / f"{file}.py"))
    settings: dict[str, Any] = {"recovery": "bias", "head_unit": head_unit}
    for name in (theirs, f"my-{theirs}"):
        slimllm.prune(STORIES, tmp_path / name, config(token_ids, criterion=name, **settings))
    for shard in (tmp_path / theirs).glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / f"my-{theirs}" / shard.name).read_bytes()


def test_its_own_option(forgotten: None, token_ids: torch.Tensor, tmp_path: Path) -> None:
    import_plugin(str(EXAMPLES / "own_score.py"))
    score = CRITERIA.all()["own-score"]
    weights_alone = slimllm.prune(STORIES, tmp_path / "0", config(token_ids, criterion=score(power=0)))
    both = slimllm.prune(STORIES, tmp_path / "1", config(token_ids, criterion="own-score"))
    assert weights_alone.config["method_settings"]["criterion"] == {"power": 0.0}
    assert "own-score (power 0.0)" in weights_alone.methods and "own-score," in both.methods  # the default is not shown
    importance = [[layer.get("channel_importance") for layer in report.layers] for report in (weights_alone, both)]
    assert any(importance[0]) and importance[0] != importance[1]
    assert json.loads((tmp_path / "1" / "report.json").read_text())["identity"]["method_settings"]["criterion"] == {
        "power": 1.0
    }


SMALL = ["--ratio", "0.4", "--samples", "4", "--seq-len", "32", "--max-windows", "2", "--plugin", EXAMPLES / "own_score.py"]


def test_compared_with_others(forgotten: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its options reach every row that has it, and no other."""
    found = {}
    for power in ("0", "1"):
        out = tmp_path / f"{power}.jsonl"
        methods = ["--method", "own-score+bias", "--method", "slimllm", "--own-score.power", power]
        code, printed, err = call(capsys, "compare", STORIES, *SMALL, *methods, "--out", out, "--quiet")
        assert code == 0 and not printed, err
        found[power] = {line["method"]: line["perplexity"] for line in map(json.loads, out.read_text().splitlines())}
    assert found["0"].keys() == {"dense", "slimllm", "own-score + bias"}
    differ = [name for name in found["0"] if found["0"][name] != found["1"][name]]
    assert differ == ["own-score + bias"]
    rows = [json.loads(line) for line in (tmp_path / "0.jsonl").read_text().splitlines()]
    assert "criterion own-score (power 0.0), allocation auto, recovery bias" in {row["methods"] for row in rows}
    assert {row["samples"] for row in rows} == {4}
    code, _, err = call(capsys, "compare", STORIES, *SMALL, "--method", "slimllm", "--own-score.power", "2")
    assert code == 2 and "--own-score.power is an option of own-score, which this run does not use" in err


@pytest.mark.slow
def test_swept(forgotten: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    speeds = ["--prompt", "8", "--new-tokens", "2", "--rounds", "1"]
    options = ["--preset", "own-score", "--out", tmp_path / "sweep", *speeds, "--quiet"]
    code, _, err = call(capsys, "sweep", STORIES, *SMALL, *options)
    assert code == 0, err
    lines = [json.loads(line) for line in (tmp_path / "sweep" / "sweep.jsonl").read_text().splitlines()]
    assert [line["preset"] for line in lines] == ["dense", "own-score"]
    assert lines[1]["methods"]["criterion"][1] == {"power": 1.0}
    code, _, err = call(capsys, "sweep", STORIES, *SMALL, *options, "--resume", "--own-score.power", "2")
    assert code == 2 and "Another method was called own-score" in err


def test_measured(forgotten: None) -> None:
    """In a process of its own, which imports it, too."""
    plugin = str(EXAMPLES / "own_score.py")
    import_plugin(plugin)
    score = CRITERIA.make("own-score", {"power": 2.0})
    row = measure(Setting(str(STORIES), samples=4, seq_len=32, criterion=score, plugins=(plugin,)))
    assert row["criterion"] == "own-score" and row["method_settings"]["criterion"] == {"power": 2.0}
    assert row["allocation"] == "auto" and row["times_floor"] > 0 and json.dumps(row)


@pytest.mark.slow
def test_measured_by_the_command(forgotten: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plugin = tmp_path / "rows.jsonl", EXAMPLES / "own_score.py"
    small = ["--samples", "4", "--seq-len", "32", "--plugin", plugin, "--criterion", "own-score", "--own-score.power", "2"]
    code, _, err = call(capsys, "bench", STORIES, *small, "--layers", "2", "--recovery", "bias", "--out", out)
    assert code == 0, err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["recovery"] for row in rows] == ["bias"]
    assert all(row["method_settings"]["criterion"] == {"power": 2.0} for row in rows)
