"""A BOS before every window where the tokenizer adds one to a text, in every command that measures or calibrates."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call
from conftest import STORIES, logged
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import plain_perplexity

import slimllm
from slimllm import InputError, PruneConfig
from slimllm.calibration import bundled_text, calibration_windows, draw_windows, tokenize, window_bos, windows_of
from slimllm.checkpoints.opening import open_checkpoint
from slimllm.finetuning.data import read_examples

BOS = 1  # of the bundled model, whose tokenizer adds it


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return open_checkpoint(STORIES).tokenizer()


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """The bundled model with a tokenizer that has a BOS but adds none."""
    folder = tmp_path / "plain"
    shutil.copytree(STORIES, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    own = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**own, "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False})
    )
    return folder


def test_the_rule(tokenizer: Any, plain: Path) -> None:
    assert [window_bos(tokenizer, choice) for choice in ("auto", "always", "never")] == [BOS, BOS, None]
    without = open_checkpoint(plain).tokenizer()
    assert without("a")["input_ids"][0] != BOS and without.bos_token_id == BOS
    assert [window_bos(without, choice) for choice in ("auto", "always", "never")] == [None, BOS, None]
    without.bos_token = None
    assert window_bos(without, "auto") is None
    with pytest.raises(InputError, match="bos is always, but the tokenizer of this model has no BOS token"):
        window_bos(without, "always")
    with pytest.raises(InputError, match="bos must be one of auto, always, never, got 'sometimes'"):
        PruneConfig(0.2, "slimllm", bos="sometimes")


@settings(max_examples=60, deadline=None)
@given(length=st.integers(0, 200), seq_len=st.integers(2, 20), begins=st.booleans())
def test_windows_with_a_bos(length: int, seq_len: int, begins: bool) -> None:
    """Every window is the BOS and the next tokens of the text, each of which is there once; none longer than asked."""
    text = torch.arange(10, 10 + length)
    stream = torch.cat([torch.tensor([BOS]), text]) if begins else text
    windows = windows_of(stream, seq_len, BOS)
    assert windows.shape == (length // (seq_len - 1), seq_len) and bool((windows[:, 0] == BOS).all())
    assert torch.equal(windows[:, 1:].flatten(), text[: windows[:, 1:].numel()])
    assert torch.equal(windows_of(stream, seq_len), stream[: len(stream) // seq_len * seq_len].view(-1, seq_len))


def made(tokenizer: Any, **settings: Any) -> tuple[torch.Tensor, list[str]]:
    config = PruneConfig(ratio=0.2, samples=8, seq_len=32, **settings)
    with logged() as told:
        return calibration_windows(config, tokenizer, open_checkpoint(STORIES).config).token_ids, told


def test_calibration_windows(tokenizer: Any) -> None:
    """Of the bundled text; the preset paper's is the novel alone."""
    stream, novel = (tokenize(tokenizer, [bundled_text(name)]) for name in ("calibration", "novel"))
    with_bos, as_it_is = draw_windows(stream, 8, 32, 0, BOS), draw_windows(novel, 8, 32, 0)
    assert torch.equal(made(tokenizer)[0], with_bos) and torch.equal(made(tokenizer, bos="always")[0], with_bos)
    assert torch.equal(made(tokenizer, preset="paper")[0], as_it_is)
    assert torch.equal(made(tokenizer, preset="paper", bos="always")[0], draw_windows(novel, 8, 32, 0, BOS))
    assert int((with_bos[:, 0] == BOS).sum()) == 8 and int((as_it_is == BOS).sum()) <= 1


def test_the_preset_paper_stays_as_published_and_says_so(tokenizer: Any, plain: Path) -> None:
    _, told = made(tokenizer, preset="paper")
    assert any("paper puts no BOS before the calibration windows, as published" in sentence for sentence in told)
    _, told = made(tokenizer, preset="paper", bos="always")
    assert not any("BOS" in sentence for sentence in told)
    _, told = made(open_checkpoint(plain).tokenizer(), preset="paper")
    assert not any("BOS" in sentence for sentence in told)


def test_perplexity_scores_the_text_after_the_bos(stories: Any, tokenizer: Any) -> None:
    stream = tokenize(tokenizer, [bundled_text("evaluation")[:8000]])
    wanted = plain_perplexity(stories, windows_of(stream, 64, BOS))
    assert slimllm.perplexity(stories, stream, seq_len=64, bos_token_id=BOS) == pytest.approx(wanted, rel=1e-5)
    assert slimllm.perplexity(stories, stream, seq_len=64) != pytest.approx(wanted, rel=1e-3)


def test_the_reports_perplexity_is_that_of_the_held_out_windows(stories: Any, tokenizer: Any, tmp_path: Path) -> None:
    """The choice is in report.json, beside its perplexity, in the model card, and in the identity of the run."""
    settings: dict[str, Any] = {"samples": 4, "seq_len": 64}
    reports = {
        bos: slimllm.prune(STORIES, tmp_path / bos, PruneConfig(ratio=0.2, bos=bos, **settings))
        for bos in ("auto", "never")
    }
    stream = tokenize(tokenizer, [bundled_text("calibration")])
    for bos, begin, words in (("auto", BOS, "with BOS"), ("never", None, "no BOS")):
        report = reports[bos]
        wanted = plain_perplexity(stories, draw_windows(stream[1:], 6, 64, 0, begin)[4:])
        assert report.calibration["perplexity_dense"] == pytest.approx(wanted, rel=1e-4)
        assert (report.calibration["bos"], report.calibration["bos_token_id"]) == (words, begin)
        assert words in (tmp_path / bos / "README.md").read_text()
        assert report.config["bos"] == report.identity["bos"] == bos
    given = PruneConfig(0.2, "slimllm", calibration=draw_windows(stream, 4, 64, 0))
    assert slimllm.prune(STORIES, tmp_path / "ids", given).calibration["bos"] == "as given"


def test_commands_say_it_beside_every_perplexity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few: list[str | Path] = ["--samples", "4", "--seq-len", "32"]
    code, out, err = call(capsys, "prune", STORIES, "--out", tmp_path / "out", "--ratio", "0.2", *few)
    assert code == 0 and "perplexity, 64 held-out tokens of the calibration text, with BOS" in out, err
    assert "(with BOS)" in (tmp_path / "out" / "report.html").read_text()
    found = {}
    for bos, words in (("auto", "with BOS"), ("never", "no BOS")):
        file = tmp_path / f"{bos}.json"
        code, out, err = call(capsys, "eval", STORIES, tmp_path / "out", "--max-windows", "4", "--bos", bos, "--out", file)
        assert code == 0 and f"4 windows of 128 tokens, {words}" in out and f"perplexity ({words})" in out, err
        found[bos] = json.loads(file.read_text())
        assert found[bos]["bos"] == bos and found[bos]["models"][0]["bos_token_id"] == (BOS if bos == "auto" else None)
    assert found["auto"]["models"][0]["perplexity"] != found["never"]["models"][0]["perplexity"]
    code, out, err = call(
        capsys,
        "compare",
        STORIES,
        "--ratio",
        "0.2",
        "--method",
        "random",
        "--max-windows",
        "4",
        *few,
        "--out",
        tmp_path / "lines.jsonl",
    )
    assert code == 0 and "perplexity in windows of 128 tokens, with BOS" in out, err
    line = json.loads((tmp_path / "lines.jsonl").read_text().splitlines()[0])
    assert line["bos_token_id"] == BOS and line["perplexity"] == pytest.approx(
        found["auto"]["models"][0]["perplexity"]["128"]
    )


def test_models_with_and_without_are_not_compared(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "eval", STORIES, plain, "--max-windows", "2")
    assert code == 0 and "cannot be compared" in out and "perplexity (with BOS, no BOS)" in out, err


def test_text_to_train_on(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Once upon a time there was a little dog. " * 50)
    examples = read_examples(tmp_path / "text.txt", tokenizer, 32)
    assert len(examples) > 5 and all(example.ids[0] == BOS and len(example.ids) == 32 for example in examples)


def test_never_is_no_bos_at_all(stories: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The one that the tokenizer puts before the whole text is left out too; the preset paper keeps it, as published."""
    text = bundled_text("evaluation")
    with_own, without = tokenize(tokenizer, [text]), tokenize(tokenizer, [text], "never")
    assert with_own[0] == BOS and torch.equal(without, with_own[1:]) and not bool((without == BOS).any())
    wanted = plain_perplexity(stories, without[:64][None])
    code, out, err = call(capsys, "eval", STORIES, "--max-windows", "1", "--seq-len", "64", "--bos", "never")
    found = re.search(r"perplexity ([\d.]+)   \(1 windows of 64 tokens, no BOS\)", out)
    assert code == 0 and found and float(found[1]) == pytest.approx(wanted, rel=1e-5), err
    stream = tokenize(tokenizer, [bundled_text("calibration")])
    assert torch.equal(made(tokenizer, bos="never")[0], draw_windows(stream[1:], 8, 32, 0))
