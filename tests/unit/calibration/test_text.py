"""Calibration windows and perplexity."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import plain_perplexity

import slimllm
from slimllm import InputError, PruneConfig
from slimllm.calibration import bundled_text, draw_windows, read_texts, tokenize, windows_of
from slimllm.checkpoints.opening import open_checkpoint


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(20, 500), seq_len=st.integers(2, 20), seed=st.integers(0, 99), data=st.data())
def test_windows_are_drawn_by_the_documented_rule(tokens: int, seq_len: int, seed: int, data: st.DataObject) -> None:
    stream = torch.arange(tokens)
    count = tokens // seq_len
    samples = data.draw(st.integers(1, count))
    got = draw_windows(stream, samples, seq_len, seed)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
    assert got.tolist() == [list(range(i * seq_len, (i + 1) * seq_len)) for i in order.tolist()]


def test_too_short_a_text() -> None:
    with pytest.raises(InputError, match="10 tokens, that is 2 windows of 4, but 3"):
        draw_windows(torch.arange(10), 3, 4, 0)


def test_text_files(tmp_path: Path, stories_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One. Two.")
    (tmp_path / "a.jsonl").write_text('{"text": "One."}\n\n{"text": "Two.", "n": 1}\n')
    assert read_texts(tmp_path / "a.txt", 1) == ["One. Two."]
    assert read_texts(tmp_path / "a.jsonl", 1) == ["One.", "Two."]
    tokenizer = open_checkpoint(stories_path).tokenizer()
    joined = tokenizer("One.\n\nTwo.")["input_ids"]
    assert tokenize(tokenizer, ["One.", "Two."]).tolist() == joined
    (tmp_path / "empty.txt").write_text("  \n")
    with pytest.raises(InputError, match="holds no text"):
        read_texts(tmp_path / "empty.txt", 1)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="cannot be read"):
        read_texts(tmp_path / "latin.txt", 1)


def test_datasets_are_read_by_name(tmp_path: Path, stories_path: Path) -> None:
    """A folder of data files is a dataset, too, and needs no network."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = [{"text": f"Row {i} of a little story about a cat."} for i in range(200)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "test.jsonl").write_text(json.dumps({"text": "held out"}))
    assert read_texts(str(folder), 20)[:2] == [rows[0]["text"], rows[1]["text"]]
    assert len(read_texts(str(folder), 20)) < 200
    assert read_texts(f"{folder}::test", 20) == ["held out"]
    with pytest.raises(InputError, match=r'has no column "sentence"; name the one with the text: NAME:CONFIG:SPLIT:COLUMN'):
        read_texts(f"{folder}:::sentence", 20)
    other = tmp_path / "a@b"  # no revision of another one
    other.mkdir()
    (other / "validation.jsonl").write_text(json.dumps({"text": "no", "sentence": "of a sentence"}))
    assert read_texts(f"{other}::validation:sentence", 20) == ["of a sentence"]
    report = slimllm.prune(
        stories_path, tmp_path / "out", PruneConfig(0.2, "slimllm", calibration=str(folder), samples=4, seq_len=32)
    )
    assert report.calibration["tokens"] == 128


@pytest.mark.parametrize(
    ("name", "path", "part", "split", "column"),
    [
        ("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text"),
        ("ptb", "ptb-text-only/ptb_text_only", "penn_treebank", "validation", "sentence"),
    ],
)
def test_texts_of_the_papers(
    name: str, path: str, part: str, split: str, column: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What LLM-Pruner and SlimLLM measure on is what the hub is asked for; a folder of that name comes first."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(*arguments: Any, **settings: Any) -> list[dict[str, str]]:
        asked.append((*arguments, settings["split"]))
        return [{column: "one"}, {column: "two"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert read_texts(name, 20) == ["one", "two"] and asked == [(path, part, split)]
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    with pytest.raises(InputError, match='has no column "text"') if column != "text" else nullcontext():
        read_texts(name, 20)
    assert asked[1] == (name, None, "train")


def test_bundled_texts_do_not_overlap() -> None:
    calibration, novel, evaluation = map(bundled_text, ("calibration", "novel", "evaluation"))
    assert len(calibration) > 750_000 and len(novel) > 900_000 and len(evaluation) > 200_000
    middle = evaluation[1000:1400]
    assert middle not in calibration and middle not in novel
    assert calibration[:200_000] == novel[:200_000] and calibration[-70_000:-1000] not in novel


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_perplexity_against_plain(stories: Any, token_ids: torch.Tensor, batch_size: int) -> None:
    stream = token_ids.flatten()[:700]
    wanted = plain_perplexity(stories, windows_of(stream, 64))
    assert slimllm.perplexity(stories, stream, seq_len=64, batch_size=batch_size) == pytest.approx(wanted, rel=1e-5)


def test_perplexity_of_real_text(stories: Any, stories_path: Path) -> None:
    """The model was trained on such stories, and is much worse at Tolstoy."""
    tokenizer = open_checkpoint(stories_path).tokenizer()
    story = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw "
        'a big red ball. She wanted to play with it. Her mom said, "Let\'s go home." Lily was very happy. '
    )
    own = slimllm.perplexity(stories, tokenize(tokenizer, [story]), seq_len=64)
    other = slimllm.perplexity(stories, tokenize(tokenizer, [bundled_text("evaluation")]), seq_len=64, max_windows=20)
    assert own < 8 < 30 < other


def test_perplexity_errors(stories: Any) -> None:
    with pytest.raises(InputError, match="fewer than one window"):
        slimllm.perplexity(stories, torch.arange(10))
    with pytest.raises(InputError, match="at most 512"):
        slimllm.perplexity(stories, torch.arange(600), seq_len=600)
    with pytest.raises(InputError, match="at least"):
        slimllm.perplexity(stories, torch.arange(600), batch_size=0)
