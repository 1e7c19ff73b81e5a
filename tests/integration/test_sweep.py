"""Sweeps over ratios: what is measured, which points no other beats, and that a sweep can be gone on with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call
from conftest import STORIES, config

from slimllm import load, perplexity, prune
from slimllm.calibration import bundled_text, tokenize
from slimllm.checkpoints.opening import open_checkpoint
from slimllm.errors import InputError
from slimllm.experiments.sweep import Swept, on_front, parse_ratios, sweep

POINT = Swept("best", 0.2, 100, 20.0, 0.1, 1.0, 1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("words", "ratios"),
    [
        (["0.1:0.6:0.1"], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
        (["0.5", "0.2"], [0.2, 0.5]),
        (["0.1:0.3:0.1", "0.2", "0.25"], [0.1, 0.2, 0.25, 0.3]),
        (["0.1:0.35:0.1"], [0.1, 0.2, 0.3]),
        ([".3:.3:1"], [0.3]),
    ],
)
def test_ratios(words: list[str], ratios: list[float]) -> None:
    assert parse_ratios(words) == ratios


@pytest.mark.parametrize(
    "words", [["0.1:0.6"], ["a"], ["0.6:0.1:0.1"], ["0.1:0.6:0"], ["0.0001:0.9:0.0001"], ["0"], ["1"], []]
)
def test_ratios_that_are_none(words: list[str]) -> None:
    with pytest.raises(InputError, match=r"[Rr]atio"):
        parse_ratios(words)


def test_the_front() -> None:
    def point(preset: str, ratio: float, parameters: int, perplexity: float) -> Swept:
        return dataclasses.replace(POINT, preset=preset, ratio=ratio, parameters=parameters, perplexity=perplexity)

    points = [
        point("dense", 0.0, 100, 10.0),
        point("a", 0.2, 80, 12.0),
        point("b", 0.2, 80, 13.0),
        point("a", 0.5, 50, 30.0),
        point("b", 0.5, 50, 30.0),
        point("b", 0.4, 60, 31.0),
    ]
    assert on_front(points) == {("dense", 0.0), ("a", 0.2), ("a", 0.5), ("b", 0.5)}


@pytest.mark.slow
def test_points_are_those_of_single_runs(token_ids: torch.Tensor, tmp_path: Path) -> None:
    tokens = tokenize(open_checkpoint(STORIES).tokenizer(), [bundled_text("evaluation")[:10_000]])
    told: list[Swept] = []
    points = sweep(
        STORIES,
        [0.4],
        config(token_ids),
        tokens,
        presets=["slimllm", "best"],
        prompt=16,
        new_tokens=3,
        rounds=1,
        keep=tmp_path / "kept",
        on_point=told.append,
    )
    assert [(point.preset, point.ratio) for point in points] == [("dense", 0.0), ("slimllm", 0.4), ("best", 0.4)]
    assert sorted(map(str, told)) == sorted(map(str, points))
    prune(STORIES, tmp_path / "alone", config(token_ids, ratio=0.4, preset="best"))
    model = load(tmp_path / "alone")[0]
    last = points[-1]
    assert last.perplexity == perplexity(model, tokens) == perplexity(load(tmp_path / "kept/best/0.4")[0], tokens)
    assert last.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert last.decode_speedup > 0 and last.prefill_per_s > 0 and points[0].decode_speedup == 1.0
    again = sweep(STORIES, [0.4], config(token_ids), tokens, presets=["slimllm", "best"], done=points, rounds=1)
    assert again == points  # nothing is measured twice


@pytest.mark.slow
def test_interrupted_while_it_measures(token_ids: torch.Tensor, tmp_path: Path) -> None:
    """What is pruned and kept, but was not measured, is measured when the sweep goes on."""
    tokens = tokenize(open_checkpoint(STORIES).tokenizer(), [bundled_text("evaluation")[:5_000]])
    quick: dict[str, Any] = {"prompt": 8, "new_tokens": 2, "rounds": 1, "keep": str(tmp_path / "kept")}
    told: list[Swept] = []

    def stop(point: Swept) -> None:
        told.append(point)
        if point.preset != "dense":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(STORIES, [0.2, 0.4], config(token_ids), tokens, on_point=stop, **quick)
    assert (tmp_path / "kept" / "best" / "0.2" / "report.json").is_file()
    points = sweep(STORIES, [0.2, 0.4], config(token_ids), tokens, done=told[:1], **quick)  # as if it had not been written
    assert [point.ratio for point in points] == [0.0, 0.2, 0.4]
    assert points[1].perplexity == told[1].perplexity


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"presets": ["slimllm", "bets"]}, "'bets' is not a method"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"prompt": 500}, "500 tokens and 32 new ones are more than"),
        ({"seq_len": 9999}, "seq_len is 9999"),
        ({"presets": []}, "at least one ratio and one preset"),
    ],
)
def test_refused_before_anything_is_pruned(token_ids: torch.Tensor, settings: dict[str, Any], sentence: str) -> None:
    def progress(*about: object) -> None:
        raise AssertionError("it was begun")

    with pytest.raises(InputError, match=sentence):
        sweep(STORIES, [0.2], config(token_ids), token_ids.flatten(), progress=progress, **settings)


def test_folders_that_are_not_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another's folder is refused as it is, and a sweep that failed leaves none."""
    out = tmp_path / "sweep"
    code, _, words = call(capsys, "sweep", STORIES, "--preset", "bets", "--out", out, "--max-windows", "2")
    assert code == 2 and "'bets' is not a method" in words and not out.exists()
    out.mkdir()
    (out / "letter.txt").write_text("mine")
    for more in ([], ["--resume"]):
        code, _, words = call(capsys, "sweep", STORIES, "--out", out, *more)
        assert code == 2 and "is not empty (letter.txt) and holds no sweep" in words
        assert [path.name for path in out.iterdir()] == ["letter.txt"]


@pytest.mark.slow
def test_kept_models_before_the_first_point(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted there, a sweep has no points yet, and can be gone on with."""
    options = ["--ratio", "0.2", "--out", tmp_path / "out", "--samples", "4", "--seq-len", "32", "--max-windows", "2"]
    options += ["--prompt", "8", "--new-tokens", "2", "--rounds", "1", "--keep", "--resume"]

    def fail(*arguments: object, **settings: object) -> None:
        raise InputError("The power failed.")

    with monkeypatch.context() as patch:
        patch.setattr("slimllm.experiments.sweep.measure_latency", fail)
        code, _, words = call(capsys, "sweep", STORIES, *options)
    assert code == 2 and "The power failed" in words
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["best"]
    code, _, words = call(capsys, "sweep", STORIES, *options)
    assert code == 0, words
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"best", "sweep.jsonl", "sweep.png"}


@pytest.mark.slow
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sweep"
    options = [
        "--out",
        out,
        "--samples",
        "4",
        "--seq-len",
        "32",
        "--max-windows",
        "4",
        "--prompt",
        "8",
        "--new-tokens",
        "2",
    ]
    options += ["--rounds", "1"]
    code, words, _ = call(capsys, "sweep", STORIES, "--ratio", "0.2", *options)
    assert code == 0 and "best" in words and "0.2" in words
    assert {path.name for path in out.iterdir()} == {"sweep.jsonl", "sweep.png"}
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    lines = (out / "sweep.jsonl").read_text().splitlines()
    assert [json.loads(line)["preset"] for line in lines] == ["dense", "best"]

    code, _, words = call(capsys, "sweep", STORIES, "--ratio", "0.4", *options)
    assert code == 2 and "holds a sweep already; add --resume" in words
    code, _, words = call(capsys, "sweep", STORIES, "--ratio", "0.4", *options, "--resume", "--seed", "1")
    assert code == 2 and "had another seed (0) than this one (1)" in words
    assert (out / "sweep.jsonl").read_text().splitlines() == lines
    code, words, _ = call(capsys, "sweep", STORIES, "--ratio", "0.2:0.4:0.2", *options, "--resume")
    assert code == 0
    now = (out / "sweep.jsonl").read_text().splitlines()
    assert now[:2] == lines and [json.loads(line)["ratio"] for line in now] == [0.0, 0.2, 0.4]
    with (out / "sweep.jsonl").open("a") as file:
        file.write('{"preset": "def')  # a line that was being written when the power failed
    code, words, _ = call(capsys, "sweep", STORIES, "--ratio", "0.2:0.4:0.2", *options, "--resume")
    assert code == 0 and (out / "sweep.jsonl").read_text().splitlines() == now
    (out / "sweep.jsonl").write_text("nonsense\n")
    code, _, words = call(capsys, "sweep", STORIES, "--ratio", "0.4", *options, "--resume")
    assert code == 2 and "Line 1 of" in words
