"""Windows of the calibration text that nothing is fitted to: the perplexity of a run is of these."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call
from conftest import STORIES, logged, pruned
from reference import plain_perplexity
from transformers import AutoModelForCausalLM

import slimllm
from slimllm import PruneConfig
from slimllm.calibration import Calibration, calibration_windows, draw_windows, num_held_out, tokenize
from slimllm.checkpoints.opening import open_checkpoint
from slimllm.pruning.shapes import samples_for
from slimllm.runtime.hidden_states import Placement


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return open_checkpoint(STORIES).tokenizer()


def drawn(tokenizer: Any, text: Path, samples: int, **settings: Any) -> tuple[Calibration, list[str]]:
    config = PruneConfig(
        **{
            "ratio": 0.2,
            "preset": "slimllm",
            "calibration": text,
            "samples": samples,
            "seq_len": 32,
            "bos": "never",
            **settings,
        }
    )
    with logged() as told:
        return calibration_windows(config, tokenizer, open_checkpoint(STORIES).config), told


@pytest.mark.parametrize(("samples", "wanted"), [(1, 2), (8, 2), (20, 2), (21, 3), (32, 4), (128, 13)])
def test_a_tenth_and_two_at_least(samples: int, wanted: int) -> None:
    assert num_held_out(samples) == wanted


def test_windows_in_the_statistics_do_not_depend_on_those_held_out(tokenizer: Any, tmp_path: Path) -> None:
    """The text has 40 windows: for 38 of them two are left to hold out, for 39 one, for 40 none, which is said."""
    stream = tokenize(tokenizer, ["word " * 4000], "never")[: 40 * 32 + 5]
    text = tmp_path / "text.txt"
    text.write_text(tokenizer.decode(stream))
    stream = tokenize(tokenizer, [text.read_text()], "never")
    count = len(stream) // 32
    for samples, held_out in ((8, 2), (count - 2, 2), (count - 1, 1), (count, 0)):
        calibration, told = drawn(tokenizer, text, samples, preset="paper")
        assert torch.equal(calibration.token_ids, draw_windows(stream, samples, 32, 0))
        every = torch.cat([calibration.token_ids, calibration.held_out])
        assert torch.equal(every, draw_windows(stream, samples + held_out, 32, 0))
        short = [sentence for sentence in told if "windows beyond those for the statistics" in sentence]
        assert len(short) == (held_out < num_held_out(samples))
    assert "no windows beyond" in short[0] and "the windows that the model is fitted to" in short[0]


@pytest.mark.parametrize(
    ("settings", "channels", "wanted"),
    [
        ({}, 11008, 32),
        ({"preset": "paper"}, 11008, 32),
        ({"preset": "best"}, 1536, 32),
        ({"preset": "best"}, 11008, 172),
        ({"preset": "best", "seq_len": 512}, 11008, 43),
        ({"recovery": "lstsq"}, 17920, 280),
        ({"allocation": "auto"}, 17920, 280),
        ({"preset": "best", "samples": 8}, 17920, 8),
    ],
)
def test_wide_layers_get_two_tokens_for_a_channel(settings: dict[str, Any], channels: int, wanted: int) -> None:
    assert samples_for(PruneConfig(**{"ratio": 0.2, "preset": "slimllm", **settings}), channels) == wanted


def test_a_short_text_gives_fewer_windows(tokenizer: Any, tmp_path: Path) -> None:
    """A tenth of its windows is held out. Fewer than the usual number are refused, and so is a given number."""
    model_config = open_checkpoint(STORIES).config
    text = tmp_path / "text.txt"
    config = PruneConfig(0.2, "slimllm", calibration=text, seq_len=32, bos="never")
    for length in (60, 20):
        text.write_text(tokenizer.decode(tokenize(tokenizer, ["word " * 4000], "never")[: length * 32 + 5]))
        there = len(tokenize(tokenizer, [text.read_text()], "never")) // 32
        if length == 20:
            with pytest.raises(slimllm.InputError, match=r"windows of 32, but 32 are asked"):
                calibration_windows(config, tokenizer, model_config, 200)
            continue
        calibration = calibration_windows(config, tokenizer, model_config, 200)
        assert len(calibration.held_out) == num_held_out(there)
        assert len(calibration.token_ids) + len(calibration.held_out) == there
        with pytest.raises(slimllm.InputError, match=r"windows of 32, but 200 are asked"):
            calibration_windows(dataclasses.replace(config, samples=200), tokenizer, model_config, 200)


def test_the_report_has_the_number_that_was_taken(tmp_path: Path) -> None:
    """Two tokens for each of 172 channels are 43 windows of 8 tokens."""
    settings = {"ratio": 0.2, "seq_len": 8}
    report = slimllm.prune(STORIES, tmp_path / "out", PruneConfig(**settings))
    assert report.calibration["samples"] == 43
    assert (
        slimllm.prune(STORIES, tmp_path / "other", PruneConfig(preset="slimllm", **settings)).calibration["samples"] == 32
    )


@pytest.mark.parametrize("preset", ["paper", "best"])
def test_held_out_windows_change_nothing_but_the_perplexity(
    stories: Any, tokenizer: Any, tmp_path: Path, preset: str
) -> None:
    """The weights are those of the windows given as token ids; the perplexities those of the two models on what is left."""
    settings: dict[str, Any] = {"preset": preset, "bos": "never"}
    report = slimllm.prune(STORIES, tmp_path / "text", PruneConfig(ratio=0.4, samples=4, seq_len=64, **settings))
    calibration = calibration_windows(PruneConfig(ratio=0.4, samples=4, seq_len=64, **settings), tokenizer, stories.config)
    given = slimllm.prune(
        STORIES, tmp_path / "ids", PruneConfig(ratio=0.4, calibration=calibration.token_ids, preset=preset)
    )
    for path in sorted((tmp_path / "ids").glob("*.safetensors")):
        digests = [hashlib.sha256((tmp_path / name / path.name).read_bytes()).digest() for name in ("text", "ids")]
        assert digests[0] == digests[1], path.name
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "text", trust_remote_code=True).eval()
    for one, windows in ((report, calibration.held_out), (given, calibration.token_ids)):
        found = one.calibration
        assert found["perplexity_dense"] == pytest.approx(plain_perplexity(stories, windows), rel=1e-4)
        assert found["perplexity_pruned"] == pytest.approx(plain_perplexity(pruned, windows), rel=1e-4)
        assert found["perplexity_tokens"] == windows.numel()
    assert (report.calibration["held_out"], given.calibration["held_out"]) == (2, 0)
    assert report.judged_by == "128 held-out tokens of the calibration text"
    assert given.judged_by == "256 calibration tokens that it is fitted to"


def test_it_is_the_same_wherever_hidden_states_live(stories: Any, token_ids: torch.Tensor) -> None:
    losses = []
    for place, batch_size in (("device", 1), ("disk", 3)):
        calibration = Calibration(token_ids[:8], token_ids[8:13])
        config = PruneConfig(0.3, "slimllm", batch_size=batch_size)
        pruning = pruned(copy.deepcopy(stories), calibration, config, Placement(states=place))
        losses.append((pruning.dense.loss, pruning.loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][1] > losses[0][0]


def test_what_is_printed_and_written_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In-sample the 35 samples of 2 tokens look better than they are, and there are fewer tokens than channels."""
    few = ("--samples", "8", "--seq-len", "16", "--preset", "best")
    code, out, err = call(capsys, "prune", STORIES, "--out", tmp_path / "out", "--ratio", "0.3", *few)
    words = "32 held-out tokens of the calibration text"
    assert code == 0 and f"perplexity, {words}" in out, err
    assert "obs and lstsq fit the 172 channels of an FFN on 128 calibration tokens" in out
    assert "give at least 11 samples of 16 tokens" in out
    code, planned, _ = call(capsys, "plan", STORIES, "--ratio", "0.3", *few)
    assert code == 0 and "obs and lstsq fit the 172 channels" in planned
    for name in ("README.md", "report.html"):
        assert words in (tmp_path / "out" / name).read_text(), name
    assert json.loads((tmp_path / "out" / "report.json").read_text())["calibration"]["held_out"] == 2
    code, out, _ = call(capsys, "prune", STORIES, "--out", tmp_path / "more", "--ratio", "0.3", "--samples", "8")
    assert code == 0 and "fewer than" not in out
