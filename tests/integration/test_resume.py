"""An interrupted run is gone on with, and its result is, bit for bit, that of a run without interruption."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORIES, config, contents, part_of, stop_at
from safetensors.torch import load_file, save_file

import slimllm.checkpoints.writer
from slimllm import InputError, PruneConfig, prune
from slimllm.checkpoints.journal import Journal
from slimllm.errors import OutputError
from slimllm.runtime.hidden_states import State


def interrupted(out: Path, settings: PruneConfig, stage: str = "prune", layer: int = 2, model: Path = STORIES) -> Path:
    """Begin a run, or go on with it, and interrupt it; its unfinished folder."""
    with pytest.raises(KeyboardInterrupt):
        prune(model, out, settings, progress=stop_at(stage, layer), command="the command", resume=True)
    assert not out.exists()
    return out.with_name(f".{out.name}.partial")


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process wait for the disk, so that every step has its line; others leave out what it is too slow for."""
    monkeypatch.setattr(Journal, "ready", True)


@pytest.fixture(scope="module")
def expected(token_ids: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run without interruption."""
    out = tmp_path_factory.mktemp("whole") / "out"
    prune(STORIES, out, config(token_ids), command="the command")
    return contents(out)


@pytest.mark.parametrize(
    ("stage", "layer"), [("dense", 0), ("dense", 3), ("dense", 4), ("prune", 0), ("prune", 3), ("prune", 4)]
)
def test_goes_on_where_it_was(
    token_ids: torch.Tensor, tmp_path: Path, expected: dict[str, bytes], stage: str, layer: int
) -> None:
    interrupted(tmp_path / "out", config(token_ids), stage, layer)
    seen: list[tuple[str, int]] = []
    report = prune(
        STORIES,
        tmp_path / "out",
        config(token_ids),
        resume=True,
        command="the command",
        progress=lambda event: seen.append(part_of(event)),
    )
    assert contents(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    steps = [("dense", index) for index in range(5)] + [("prune", index) for index in range(5)]
    assert report.resumed_steps > 0 and seen == steps[report.resumed_steps :]
    assert len(report.layers) == 5 and report.calibration["dense_windows"] == 12  # of 16
    assert report.dense_pass_s == pytest.approx(16 / 12 * report.stages_s["dense pass"]) and report.dense_pass_s > 0


@pytest.mark.parametrize(
    ("choice", "stage"),
    [
        ({"recovery": "lstsq"}, "prune"),
        ({"recovery": "none"}, "prune"),
        ({"preset": "best"}, "dense"),
        ({"preset": "best"}, "prune"),
        ({"allocation": "flap", "recovery": "bias"}, "dense"),
        ({"criterion": "flap", "allocation": "flap", "recovery": "bias"}, "dense"),
        ({"criterion": "flap", "recovery": "none"}, "prune"),
    ],
)
def test_every_method_and_batches_of_different_sizes(
    token_ids: torch.Tensor, tmp_path: Path, choice: dict[str, Any], stage: str
) -> None:
    settings = config(token_ids, batch_size=7, head_unit="query", dtype="bfloat16", **choice)
    prune(STORIES, tmp_path / "whole", settings, command="the command")
    interrupted(tmp_path / "out", settings, stage)
    prune(STORIES, tmp_path / "out", settings, resume=True, command="the command")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_interrupted_again_and_again(token_ids: torch.Tensor, tmp_path: Path, expected: dict[str, bytes]) -> None:
    interrupted(tmp_path / "out", config(token_ids), "dense", 1)
    for stage, layer in (("dense", 3), ("prune", 1), ("prune", 4)):
        with pytest.raises(KeyboardInterrupt):
            prune(STORIES, tmp_path / "out", config(token_ids), resume=True, progress=stop_at(stage, layer))
    prune(STORIES, tmp_path / "out", config(token_ids), resume=True, command="the command")
    assert contents(tmp_path / "out") == expected


def test_a_journal_of_another_version_is_refused(token_ids: torch.Tensor, tmp_path: Path) -> None:
    journal = interrupted(tmp_path / "out", config(token_ids)) / "journal.jsonl"
    first, rest = journal.read_bytes().split(b"\n", 1)
    entries = json.loads(first.partition(b" ")[2])
    assert entries[0].pop("schema_version") == 2
    text = json.dumps(entries).encode()
    journal.write_bytes(b"%08x %b\n%b" % (zlib.crc32(text), text, rest))
    with pytest.raises(InputError, match="was started by another version of slimllm; resume it with that version, or"):
        prune(STORIES, tmp_path / "out", config(token_ids), resume=True)


@pytest.mark.parametrize("stage", ["dense", "prune"])
def test_a_slow_disk(
    token_ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes], stage: str
) -> None:
    """It takes every third state, and the run goes on behind the last of them."""
    asked = 0

    def ready(self: Journal) -> bool:
        nonlocal asked
        asked += 1
        return asked % 3 == 1

    monkeypatch.setattr(Journal, "ready", property(ready))
    interrupted(tmp_path / "out", config(token_ids), stage, 2)
    report = prune(STORIES, tmp_path / "out", config(token_ids), resume=True, command="the command")
    assert report.resumed_steps == {"dense": 1, "prune": 7}[stage]
    assert contents(tmp_path / "out") == expected


def test_nothing_is_left_of_a_run_that_did_nothing(token_ids: torch.Tensor, tmp_path: Path, told: list[str]) -> None:
    """Or of one that failed by its input: going on would fail again."""
    prune(STORIES, tmp_path / "out", config(token_ids), resume=True)  # nothing to go on with
    assert any("Nothing to resume" in sentence for sentence in told)
    huge = load_file(STORIES / "model.safetensors")
    huge["model.layers.2.mlp.down_proj.weight"] *= 1e38
    shutil.copytree(STORIES, tmp_path / "model")
    save_file(huge, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="not finite"):
        prune(tmp_path / "model", tmp_path / "other", config(token_ids))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_it_has_to_be_asked_for(token_ids: torch.Tensor, tmp_path: Path) -> None:
    partial = interrupted(tmp_path / "out", config(token_ids))
    before = contents(partial)
    with pytest.raises(InputError, match="was interrupted and can be resumed: add --resume"):
        prune(STORIES, tmp_path / "out", config(token_ids))
    assert contents(partial) == before


def test_another_run_is_refused(token_ids: torch.Tensor, tmp_path: Path, expected: dict[str, bytes]) -> None:
    partial = interrupted(tmp_path / "out", config(token_ids))
    before = contents(partial)
    weights = load_file(STORIES / "model.safetensors")
    for name in ("model.layers.4.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        other = {**weights, name: weights[name].clone()}
        other[name].view(-1)[0] *= 1.001
        shutil.copytree(STORIES, tmp_path / name)
        save_file(other, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(STORIES, tmp_path / "theta")
    changed = json.loads((STORIES / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    (tmp_path / "theta" / "config.json").write_text(json.dumps(changed))
    cases: list[tuple[Path, PruneConfig, str]] = [
        (STORIES, config(token_ids, ratio=0.31), r"another ratio \(0.3\) than this one \(0.31\)"),
        (STORIES, config(token_ids, recovery="lstsq"), "another recovery"),
        (STORIES, config(token_ids.flip(0)), "another calibration text"),
        (STORIES, config(token_ids, compute_dtype="bfloat16"), "another compute_dtype"),
        (tmp_path / "theta", config(token_ids), "another model"),
        (tmp_path / "model.layers.4.mlp.up_proj.weight", config(token_ids), "Layer 4 has other weights"),
        (tmp_path / "model.layers.0.mlp.up_proj.weight", config(token_ids), "Layer 0 has other weights"),
        (tmp_path / "model.norm.weight", config(token_ids), "another embeddings, by checksum"),
    ]
    for model, settings, sentence in cases:
        with pytest.raises(InputError, match=sentence):
            prune(model, tmp_path / "out", settings, resume=True)
        assert contents(partial) == before, sentence  # it can still be gone on with
    prune(STORIES, tmp_path / "out", config(token_ids), resume=True, command="the command")
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("stage", ["dense", "prune"])
def test_damage_is_refused(token_ids: torch.Tensor, tmp_path: Path, stage: str) -> None:
    partial = interrupted(tmp_path / "out", config(token_ids), stage)
    state = next(partial.glob("state-*.safetensors"))
    damages: list[tuple[Path, int | None]] = [(partial / "journal.jsonl", 300), (state, -100), (state, None)]
    if stage == "prune":
        damages += [(partial / "model" / "model-00002-of-00006.safetensors", place) for place in (5, -5, None)]
    for path, place in damages:
        good = path.read_bytes()
        if place is None:
            path.write_bytes(good[: len(good) // 2] if path != state else b"")
        else:
            bad = bytearray(good)
            bad[place] ^= 0xFF
            path.write_bytes(bad)
        with pytest.raises(InputError, match=f"{path.name} is missing or damaged.*delete .*.out.partial and start over"):
            prune(STORIES, tmp_path / "out", config(token_ids), resume=True)
        path.write_bytes(good)
    prune(STORIES, tmp_path / "out", config(token_ids), resume=True)


def test_what_is_not_ours_is_left(token_ids: torch.Tensor, tmp_path: Path) -> None:
    partial = interrupted(tmp_path / "out", config(token_ids))
    (partial / "journal.jsonl").write_bytes(b"")
    for resume in (False, True):
        with pytest.raises(InputError, match=r"journal\.jsonl is missing or damaged"):
            prune(STORIES, tmp_path / "out", config(token_ids), resume=resume)
        assert list(partial.glob("state-*")) and list(partial.glob("model/*"))


def test_a_line_that_was_being_written(token_ids: torch.Tensor, tmp_path: Path, expected: dict[str, bytes]) -> None:
    partial = interrupted(tmp_path / "out", config(token_ids))
    with (partial / "journal.jsonl").open("ab") as file:
        file.write(b'0123abcd {"stage": "pru')
    prune(STORIES, tmp_path / "out", config(token_ids), resume=True, command="the command")
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("where", ["shard", "state"])
def test_killed_in_a_file(
    token_ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes], where: str
) -> None:
    """What was written of it stays in the unfinished folder, such as the temporary file that safetensors makes."""
    partial = tmp_path / ".out.partial"

    def killed_in_shard(tensors: dict[str, torch.Tensor], path: Path, **arguments: object) -> None:
        if any(partial.glob("state-*.safetensors")):
            (path.parent / ".tmpQxNTKW").write_bytes(bytes(100))
            raise KeyboardInterrupt
        save_file(tensors, path, **arguments)

    def killed_in_state(self: State, path: Path) -> None:
        if any(partial.glob("state-*.safetensors")):
            path.write_bytes(bytes(100))
            raise KeyboardInterrupt
        write_state(self, path)

    write_state = State.write
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if where == "shard":
            patch.setattr(slimllm.checkpoints.writer, "save_file", killed_in_shard)
        else:
            patch.setattr(State, "write", killed_in_state)
        prune(STORIES, tmp_path / "out", config(token_ids), command="the command")
    assert [*partial.rglob(".tmp*"), *partial.glob("state-*.partial")]
    interrupted(tmp_path / "out", config(token_ids), layer=3)
    assert not [*partial.rglob(".tmp*"), *partial.glob("state-*.partial")]
    prune(STORIES, tmp_path / "out", config(token_ids), resume=True, command="the command")
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("moment", ["_remove", "rename"])
def test_interrupted_at_the_end(
    token_ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes], moment: str
) -> None:
    """Between the last file and the last rename, and between that and the removal of the journal."""

    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*((slimllm.checkpoints.writer, "_remove", fail) if moment == "_remove" else (os, "rename", fail)))
        prune(STORIES, tmp_path / "out", config(token_ids), command="the command")
    assert (tmp_path / "out").exists() == (moment == "_remove")
    report = prune(STORIES, tmp_path / "out", config(token_ids), resume=True)
    assert contents(tmp_path / "out") == expected and report.out == str(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_runs_exclude_each_other(token_ids: torch.Tensor, tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    journal = Journal(partial, {"another": "run"}, {})
    with pytest.raises(InputError, match="Another run is writing"):
        prune(STORIES, tmp_path / "out", config(token_ids))
    assert sorted(path.name for path in partial.iterdir()) == ["journal.jsonl", "lock"]
    journal.record("dense", State({}, []), similarity=0.5, weights=0)
    with pytest.raises(InputError, match="Another run is writing"):  # and not: delete it
        prune(STORIES, tmp_path / "out", config(token_ids))
    journal.close()
    shutil.rmtree(partial)
    prune(STORIES, tmp_path / "out", config(token_ids))


def _child(out: Path, resume: bool, limit: int | None, samples: int) -> None:
    """A run in a process of its own."""
    torch.set_num_threads(1)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        prune(STORIES, out, PruneConfig(0.3, "slimllm", samples=samples, seq_len=64), resume=resume, command="the command")
    except OutputError as error:
        out.with_name("error").write_text(str(error))
        os._exit(2)
    except InputError as error:
        out.with_name("error").write_text(str(error))
        os._exit(3)
    os._exit(0)


def start(out: Path, resume: bool = False, limit: int | None = None, samples: int = 16) -> Any:
    # A server that has everything imported, so that a run begins at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["slimllm.pruning.api"])
    process = context.Process(target=_child, args=(out, resume, limit, samples))
    process.start()
    return process


def finish(process: Any, seconds: float = 60) -> int:
    process.join(seconds)
    assert process.exitcode is not None, "it hangs"
    return int(process.exitcode)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], float]:
    """The files of a run in a process of its own, and its seconds."""
    folder = tmp_path_factory.mktemp("whole")
    assert finish(start(folder / "warm")) == 0
    began = time.monotonic()
    assert finish(start(folder / "out")) == 0
    return contents(folder / "out"), time.monotonic() - began


@pytest.mark.parametrize("number", [*range(5), *(pytest.param(number, marks=pytest.mark.slow) for number in range(5, 40))])
def test_killed_at_any_moment(tmp_path: Path, whole: tuple[dict[str, bytes], float], number: int) -> None:
    expected, seconds = whole
    process = start(tmp_path / "out")
    time.sleep(random.Random(number).uniform(0, seconds))
    process.kill()
    finish(process)
    if not (tmp_path / "out").exists() or (tmp_path / ".out.partial").exists():
        assert finish(start(tmp_path / "out", resume=True)) == 0, (tmp_path / "error").read_text()
    assert contents(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_killed_until_it_is_done(tmp_path: Path, whole: tuple[dict[str, bytes], float]) -> None:
    expected, _ = whole
    draw = random.Random(0)
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    for attempt in range(60):  # noqa: B007
        process, before = start(tmp_path / "out", resume=True), journal.stat().st_size if journal.exists() else 0
        while process.is_alive() and (not journal.exists() or journal.stat().st_size <= before):
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        if finish(process) == 0:
            break
    assert attempt > 1 and contents(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_full_disk(tmp_path: Path) -> None:
    """No file may grow beyond a limit, at which the disk is as good as full."""
    assert finish(start(tmp_path / "whole", samples=2)) == 0
    expected = contents(tmp_path / "whole")
    limit = max(len(content) for content in expected.values()) - 1000
    assert finish(start(tmp_path / "out", limit=limit, samples=2)) == 2
    assert re.search("Writing model-0000.-of-00006.safetensors .*failed", (tmp_path / "error").read_text())
    (tmp_path / "error").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "whole"]
    assert finish(start(tmp_path / "out", resume=True, samples=2)) == 0
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize(
    "number", [signal.SIGHUP, *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGINT, signal.SIGTERM))]
)
def test_signals(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "slimllm", "prune", str(STORIES), "--out", "out", "--ratio", "0.2"]
    command += ["--samples", "40", "--seq-len", "512", "--batch-size", "1"]  # long enough to be met at work
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    while running.poll() is None and time.monotonic() < deadline:
        if journal.is_file() and len(journal.read_bytes().splitlines()) > 2:  # its first line, and two layers
            break
        time.sleep(0.02)
    running.send_signal(number)
    if number == signal.SIGHUP:  # of a closed terminal there are two, from the shell and from the system
        running.send_signal(number)
    _, err = running.communicate(timeout=60)
    words = " ".join(err.split())
    assert running.returncode == 128 + number and "Traceback" not in err
    assert "Stopping after this layer" in words and "the same command with --resume continues from here" in words
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    done = subprocess.run([*command, "--resume"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "Resuming after layer" in done.stdout, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "--resume" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("left", ["nothing", "the lock"])
def test_what_is_left_beside_a_complete_result_goes(left: str, token_ids: torch.Tensor, tmp_path: Path) -> None:
    """A run may be killed between its last file and its folder."""
    prune(STORIES, tmp_path / "out", config(token_ids))
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    if left == "the lock":
        (partial / "lock").touch()
    before = contents(tmp_path / "out")
    prune(STORIES, tmp_path / "out", config(token_ids), resume=True)
    assert not partial.exists() and contents(tmp_path / "out") == before
