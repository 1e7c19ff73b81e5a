"""Several ratios in one go: the results of single runs, with what they have in common done once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import call
from conftest import STORIES, config, contents, part_of, stop_at

from slimllm import InputError, PruneConfig, prune, prune_ratios
from slimllm.pruning.on_disk import prune_all
from slimllm.runtime.distributed import Ranks
from slimllm.runtime.progress import LayerPruned, Progress

RATIOS = [0.2, 0.35, 0.5]


@pytest.fixture(scope="module")
def single(token_ids: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bytes]]:
    """The files of single runs."""
    folder = tmp_path_factory.mktemp("single")
    for ratio in RATIOS:
        prune(STORIES, folder / str(ratio), config(token_ids, ratio=ratio), command="the command")
    return [contents(folder / str(ratio)) for ratio in RATIOS]


def test_the_results_of_single_runs(token_ids: torch.Tensor, tmp_path: Path, single: list[dict[str, bytes]]) -> None:
    seen: list[str] = []
    reports = prune_ratios(
        STORIES,
        tmp_path / "out",
        config(token_ids),
        RATIOS,
        command="the command",
        progress=lambda event: seen.append(part_of(event)[0]),
    )
    assert seen == ["dense"] * 5 + ["prune"] * 15
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.2", "0.35", "0.5"]
    assert [contents(tmp_path / "out" / str(ratio)) for ratio in RATIOS] == single
    assert [report.dense_pass_shared for report in reports] == [False, True, True]
    assert [report.config["ratio"] for report in reports] == RATIOS
    assert all("dense pass" not in report.stages_s and report.dense_pass_s > 0 for report in reports[1:])


@pytest.mark.parametrize("calls", [2, 8, 13, 15])
def test_interrupted(token_ids: torch.Tensor, tmp_path: Path, single: list[dict[str, bytes]], calls: int) -> None:
    done = 0

    def progress(event: Progress) -> None:
        nonlocal done
        done += 1
        if done == calls:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_ratios(STORIES, tmp_path / "out", config(token_ids), RATIOS, progress=progress, command="the command")
    reports = prune_ratios(STORIES, tmp_path / "out", config(token_ids), RATIOS, resume=True, command="the command")
    assert [contents(tmp_path / "out" / str(ratio)) for ratio in RATIOS] == single
    assert [report.config["ratio"] for report in reports] == RATIOS
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.2", "0.35", "0.5"]


def test_dense_passes_of_other_methods(token_ids: torch.Tensor, tmp_path: Path) -> None:
    """One is shared only where it has all that a run needs, and a run prunes by its own statistics."""
    methods: list[dict[str, str]] = [
        {"criterion": "flap", "allocation": "flap", "recovery": "bias"},
        {"criterion": "flap", "allocation": "uniform", "recovery": "bias"},  # takes all windows, for its statistics
        {"criterion": "wanda-sp", "allocation": "uniform", "recovery": "none"},
        {},
        {"criterion": "flap", "recovery": "none"},
        {"preset": "best"},
    ]
    few = [(tmp_path / str(number), config(token_ids[:12], **row)) for number, row in enumerate(methods)]
    reports = prune_all(STORIES, few, False, False, None, "the command", Ranks())
    assert [report.dense_pass_shared for report in reports] == [False, True, True, True, True, False]
    for (out, settings), report in zip(few, reports):
        prune(STORIES, tmp_path / "alone", settings, command="the command", overwrite=True)
        assert contents(out) == contents(tmp_path / "alone")
        pruned = [layer for layer in report.layers if "attention_statistics" in layer]
        assert all((layer["attention_statistics"] == "dense") == settings.one_pass for layer in pruned)


def test_what_is_complete_is_left(token_ids: torch.Tensor, tmp_path: Path, told: list[str]) -> None:
    prune(STORIES, tmp_path / "out", config(token_ids))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    prune(STORIES, tmp_path / "out", config(token_ids), resume=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert told[-1].endswith("out is complete already.")
    with pytest.raises(InputError, match="not empty"):
        prune(STORIES, tmp_path / "out", config(token_ids.flip(0)), resume=True)
    with pytest.raises(InputError, match="not empty"):
        prune(STORIES, tmp_path / "out", config(token_ids, ratio=0.31), resume=True)


def test_a_dense_pass_that_was_begun_on_its_own(
    token_ids: torch.Tensor, tmp_path: Path, single: list[dict[str, bytes]]
) -> None:
    """The second ratio goes on with the first one's dense pass, and is interrupted again."""
    with pytest.raises(KeyboardInterrupt):
        prune(STORIES, tmp_path / "out" / "0.5", config(token_ids, ratio=0.5), progress=stop_at("dense", 2))
    calls = 0

    def progress(event: Progress) -> None:
        nonlocal calls
        calls += isinstance(event, LayerPruned)
        if calls == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_ratios(STORIES, tmp_path / "out", config(token_ids), [0.2, 0.5], resume=True, progress=progress)
    reports = prune_ratios(STORIES, tmp_path / "out", config(token_ids), [0.2, 0.5], resume=True, command="the command")
    weights = {name: content for name, content in single[2].items() if name.endswith(".safetensors")}
    assert weights.items() <= contents(tmp_path / "out" / "0.5").items()
    assert all(report.dense_pass_s > 0 for report in reports)


def test_wrong_ratios(token_ids: torch.Tensor, tmp_path: Path) -> None:
    for ratios in ([], [0.2, 0.2]):
        with pytest.raises(InputError, match="ratios must be different from each other, and at least one"):
            prune_ratios(STORIES, tmp_path / "out", config(token_ids), ratios)
    with pytest.raises(InputError, match="between 0 and 1"):
        prune_ratios(STORIES, tmp_path / "out", config(token_ids), [0.2, 1.2])
    with pytest.raises(KeyboardInterrupt):
        prune(STORIES, tmp_path / "one" / "0.5", config(token_ids, ratio=0.5), progress=stop_at("prune", 1))
    with pytest.raises(InputError, match="was interrupted"):
        prune_ratios(STORIES, tmp_path / "one", config(token_ids), RATIOS)
    assert not (tmp_path / "out").exists() and not (tmp_path / "one" / "0.2").exists()


def test_all_ratios_are_looked_at_first(token_ids: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"0.999 is more than this model can give"):
        prune_ratios(STORIES, tmp_path / "out", config(token_ids), [0.2, 0.999])
    assert not list(tmp_path.iterdir())


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--samples", "8", "--seq-len", "64", "--ratio", "0.2", "--ratio", "0.4"]
    code, out, _ = call(capsys, "prune", STORIES, "--out", tmp_path / "out", *settings)
    assert code == 0 and "Ratio 0.4, with the same dense pass:" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.2", "0.4"]
    prune(STORIES, tmp_path / "single", PruneConfig(ratio=0.4, samples=8, seq_len=64))
    for path in (tmp_path / "single").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / "0.4" / path.name).read_bytes()
