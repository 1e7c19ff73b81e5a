"""Calibration on several texts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call
from conftest import STORIES
from hypothesis import given, settings
from hypothesis import strategies as st

import slimllm
from slimllm import InputError, PruneConfig
from slimllm.calibration import calibration_name, calibration_windows, draw_windows, sources_of, tokenize
from slimllm.calibration.mixture import Source, apportioned
from slimllm.checkpoints.opening import open_checkpoint


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return open_checkpoint(STORIES).tokenizer()


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    """Texts of one word each, so that a window says which text it is of."""
    found = {word: tmp_path / f"{word}.txt" for word in ("one", "two", "three")}
    for word, path in found.items():
        path.write_text(f"{word} " * 3000)
    return found


def counted(windows: torch.Tensor, texts: dict[str, Path], tokenizer: Any) -> dict[str, int]:
    """How many windows are of each text."""
    decoded = [tokenizer.decode(window) for window in windows]
    return dict(Counter(next(word for word in texts if word in text) for text in decoded))


@pytest.mark.parametrize(
    ("given_texts", "wanted"),
    [
        (["a", "b"], [("a", 0.5), ("b", 0.5)]),
        (["a:0.7", "b:0.3"], [("a", 0.7), ("b", 0.3)]),
        (["a:.9", "org/b:c:d:e:.9", "bundled:0.2"], [("a", 0.45), ("org/b:c:d:e", 0.45), (None, 0.1)]),
        (["a:1", "b:1.0"], [("a", 0.5), ("b", 0.5)]),
        (["org/b:20231101", "bundled"], [("org/b:20231101", 0.5), (None, 0.5)]),
        (["a:1", "b:.0001"], [("a", 10000 / 10001), ("b", 1 / 10001)]),
        ("a:0.7", [("a", 1.0)]),
        ("bundled", [(None, 1.0)]),
        (["bundled:70", "a:1"], [(None, 70 / 71), ("a", 1 / 71)]),
        (None, [(None, 1.0)]),
    ],
)
def test_names_and_shares(given_texts: Any, wanted: list[tuple[str | None, float]]) -> None:
    found = sources_of(PruneConfig(0.2, "slimllm", calibration=given_texts).calibration)  # type: ignore[arg-type]
    assert [source.name for source in found] == [name for name, _ in wanted]
    assert [source.share for source in found] == pytest.approx([share for _, share in wanted])


def test_a_file_is_found_by_its_whole_name(tmp_path: Path) -> None:
    (path := tmp_path / "odd:0.5").write_text("text")
    assert sources_of([path, "other"]) == [Source(path, 0.5), Source("other", 0.5)]


@settings(deadline=None)
@given(shares=st.lists(st.floats(0.01, 1), min_size=1, max_size=6), total=st.integers(0, 300))
def test_parts_add_up(shares: list[float], total: int) -> None:
    sources = [Source("a", share / sum(shares)) for share in shares]
    counts = apportioned(total, sources)
    assert sum(counts) == total
    assert all(abs(count - total * source.share) < 1 for count, source in zip(counts, sources))


def test_windows_of_all_texts(texts: dict[str, Path], tokenizer: Any) -> None:
    shares = [f"{path}:{share}" for path, share in zip(texts.values(), (0.5, 0.3, 0.2))]
    config = PruneConfig(0.2, "slimllm", calibration=shares, samples=40, seq_len=16, seed=3)
    found = calibration_windows(config, tokenizer, open_checkpoint(STORIES).config)
    assert counted(found.token_ids, texts, tokenizer) == {"one": 20, "two": 12, "three": 8}
    assert counted(found.held_out, texts, tokenizer) == {"one": 2, "two": 1, "three": 1}
    assert len(counted(found.token_ids[:10], texts, tokenizer)) == 3  # the first ones are of all texts
    again = calibration_windows(config, tokenizer, open_checkpoint(STORIES).config)
    assert torch.equal(found.token_ids, again.token_ids) and torch.equal(found.held_out, again.held_out)
    stream = tokenize(tokenizer, [texts["one"].read_text()])
    own = {tuple(window.tolist()) for window in draw_windows(stream, 20, 16, 3, found.bos_token_id)}
    assert own <= {tuple(window.tolist()) for window in found.token_ids}
    assert calibration_name(config) == ", ".join(f"{share}% {path}" for share, path in zip((50, 30, 20), texts.values()))


def test_one_text_in_a_list_is_that_text(texts: dict[str, Path], tokenizer: Any) -> None:
    model_config = open_checkpoint(STORIES).config
    alone, listed = (
        calibration_windows(PruneConfig(0.2, "slimllm", calibration=given, seq_len=16), tokenizer, model_config)
        for given in (texts["one"], [texts["one"]])
    )
    assert torch.equal(alone.token_ids, listed.token_ids)


@pytest.mark.parametrize(
    ("calibration", "error", "words"),
    [
        ([], InputError, "calibration is an empty list"),
        (["a", 3], TypeError, "several of these or a tensor of token ids, got int"),
    ],
)
def test_settings_that_are_refused(calibration: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        PruneConfig(0.2, "slimllm", calibration=calibration)


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ((":0.5", ""), "Give every calibration text a share"),
        ((":0.5", ":0.0"), "must be a number above 0, such as NAME:0.7, got .*two.txt:0.0"),
        ((":1", ":0"), "must be a number above 0"),
        ((":1", ":-0.5"), "must be a number above 0"),
        ((":nan", ":1"), "must be a number above 0"),
        ((":70%", ":30%"), "must be a number above 0"),
    ],
)
def test_shares_that_are_refused(texts: dict[str, Path], tokenizer: Any, shares: tuple[str, str], words: str) -> None:
    calibration = [f"{path}{share}" for path, share in zip(texts.values(), shares)]
    with pytest.raises(InputError, match=words):
        calibration_windows(
            PruneConfig(0.2, "slimllm", calibration=calibration), tokenizer, open_checkpoint(STORIES).config
        )


def test_a_text_given_twice(texts: dict[str, Path]) -> None:
    path = texts["one"]
    with pytest.raises(InputError, match=r"one.txt:0.3 is given twice; give it once, with the sum of its shares"):
        sources_of([f"{path}:0.7", f"{path.parent / '.' / path.name}:0.3"])


def test_shares_of_files_are_any_numbers(texts: dict[str, Path]) -> None:
    found = sources_of([f"{path}:{share}" for path, share in zip(texts.values(), (50, 30.0, 20))])
    assert [source.share for source in found] == pytest.approx([0.5, 0.3, 0.2])


@pytest.mark.parametrize(
    ("shares", "samples", "words"),
    [
        ((".99", ".01"), 20, r"two.txt gives none of the 20 windows; give a larger share or more samples"),
        ((".1", ".9"), 2000, r"two.txt has \d+ windows, but 1800 of the 2000 should be of it; give more text"),
    ],
)
def test_texts_that_give_too_little(
    texts: dict[str, Path], tokenizer: Any, shares: tuple[str, str], samples: int, words: str
) -> None:
    calibration = [f"{path}:{share}" for path, share in zip(texts.values(), shares)]
    config = PruneConfig(0.2, "slimllm", calibration=calibration, samples=samples, seq_len=16)
    with pytest.raises(InputError, match=words):
        calibration_windows(config, tokenizer, open_checkpoint(STORIES).config)


def test_on_the_command_line(texts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    options = ["--ratio", "0.2", "--samples", "8", "--seq-len", "16", "--no-page"]
    given = ["--calibration", f"{texts['one']}:0.75", "--calibration", f"{texts['two']}:0.25"]
    code, _, err = call(capsys, "prune", str(STORIES), "--out", out, *options, *given)
    assert code == 0, err
    report = slimllm.PruneReport.read(out)
    assert report.calibration["text"] == f"75% {texts['one']}, 25% {texts['two']}"
    assert report.config["calibration"] == [f"{texts['one']}:0.75", f"{texts['two']}:0.25"]
    (inside := tmp_path / "texts").mkdir()
    (inside / "own.txt").write_text("text " * 3000)
    given = ["--calibration", str(inside / "own.txt"), "--calibration", str(texts["one"])]
    code, _, err = call(capsys, "prune", str(STORIES), "--out", str(inside), "--overwrite", *options, *given)
    assert code == 2 and (inside / "own.txt").is_file(), err
