"""Several processes prune as one does: the same choices, sums to rounding; and what becomes of them when one is lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORIES, contents, logged, part_of, random_llama
from processes import World, results
from safetensors.torch import load_file, save_file

import slimllm.pruning.plan
import slimllm.pruning.streaming
from slimllm import InputError, PruneConfig, ops, prune, prune_model, prune_ratios
from slimllm.errors import OutputError
from slimllm.methods.criteria import Criterion, register_criterion
from slimllm.methods.recovery import Fit, Recovery, register_recovery
from slimllm.methods.statistics import SublayerStatistics
from slimllm.models.sublayer import Sublayer
from slimllm.plugins import RECOVERIES
from slimllm.pruning.report import PruneReport
from slimllm.runtime.distributed import Ranks
from slimllm.runtime.hidden_states import Placement
from slimllm.runtime.progress import Progress
from slimllm.statistics import ColumnStatistics, GramStatistics, HeadStatistics, PairedMoments

SETTINGS: dict[str, Any] = {"ratio": 0.3, "preset": "slimllm", "samples": 11, "seq_len": 64, "batch_size": 3}


def test_shares() -> None:
    for size in (1, 2, 3, 7):
        ranks = Ranks()
        ranks.size = size
        for total in (7, 11, 64):
            shares = [ranks.share(total, rank) for rank in range(size)]
            assert [index for share in shares for index in share] == list(range(total))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_errors_of_the_disk_are_sentences() -> None:
    with pytest.raises(OutputError, match=r"Reading or writing failed: .*No space left"), Ranks().together():
        raise OSError(28, "No space left on device")
    with pytest.raises(KeyError), Ranks().together():
        raise KeyError("not ours")


def _tokens(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 300, generator=generator) * torch.logspace(-2, 2, 300) + 5
    x[:30, :50] += 300  # the first rank's part is not typical, so that the pivots differ
    x[:, 60] = 0
    return x.to(dtype)


def _weight() -> torch.Tensor:
    return torch.randn(8, 300, generator=torch.Generator().manual_seed(1)) / torch.logspace(-2, 2, 300)


def _statistics(group: Any, dtype: str, out: str) -> list[int]:
    ranks = Ranks(group)
    x = _tokens(getattr(torch, dtype))
    own = x[slice(ranks.share(90).start, ranks.share(90).stop)]
    gram, columns = GramStatistics(300), ColumnStatistics(300)
    heads = HeadStatistics(_weight(), 6)
    for some in own.split(7):
        gram.update(some)
        columns.update(some)
        heads.update(some)
    ranks.add_up(gram, columns, heads)
    pairs = PairedMoments(columns.mean(), columns.mean() * 0.5)
    pairs.update(own, own * 0.5)
    ranks.add_up(pairs)
    found = [gram.covariance(), gram.norms(), columns.variance(), columns.norms(), pairs.covariance()]
    found.append(heads.head_covariance())
    save_file({str(number): one for number, one in enumerate(found)}, f"{out}-{ranks.rank}")
    return [gram.count, columns.count, pairs.count]


@pytest.mark.parametrize(("size", "dtype"), [(2, "bfloat16"), (3, "float32")])
def test_sums_over_ranks(tmp_path: Path, size: int, dtype: str) -> None:
    assert results(_statistics, size, tmp_path / "world", dtype, str(tmp_path / "sums")) == [[90, 90, 90]] * size
    x = _tokens(getattr(torch, dtype)).double()
    covariance = (x - x.mean(0)).T @ (x - x.mean(0)) / 90
    scale = covariance.diagonal().sqrt()
    files = [load_file(f"{tmp_path}/sums-{rank}") for rank in range(size)]
    found = [[file[str(number)] for number in range(6)] for file in files]
    for first, other in zip(found[0], found[-1]):
        assert torch.equal(first, other)  # to the last bit, so that all ranks go the same way
    error = (found[0][0] - covariance).abs() / (scale[:, None] * scale).clamp(min=1e-12)
    assert float(error.max()) < (1e-5 if dtype == "float32" else 4e-4)  # the raw Gram in bf16 has 17 σ² on its diagonal
    assert torch.allclose(found[0][1], x.norm(dim=0), rtol=1e-5)
    assert torch.allclose(found[0][2], covariance.diagonal(), rtol=1e-4, atol=1e-9)
    assert torch.allclose(found[0][3], x.norm(dim=0), rtol=1e-6)
    whole = ops.head_covariance(_weight().double(), covariance, 6)
    parts = whole.diagonal().sum(0).sqrt()  # of every head over all outputs
    by_head = (found[0][5] - whole).abs().sum(-1) / (parts[:, None] * parts)
    assert float(by_head.max()) < 1e-4
    half = (x - x.mean(0)).mul((x * 0.5) - (x * 0.5).mean(0)).mean(0)
    assert torch.allclose(found[0][4], half, rtol=1e-4 if dtype == "float32" else 1e-2, atol=1e-9)


def _prune(group: Any, out: str, stop: list[Any] | None, **settings: Any) -> Any:
    steps = 0

    def progress(event: Progress) -> None:
        nonlocal steps
        steps += 1
        if list(part_of(event)) == stop:
            raise InputError("stopped here")
        if settings.get("slowly"):
            time.sleep(0.3)

    if settings.get("heads"):  # by the first rank, whatever the others would choose
        slimllm.pruning.streaming.streams_heads = lambda *given: group is None or group.rank() == 0  # type: ignore[assignment]
    if "states" in settings:
        slimllm.pruning.plan.Placement = partial(Placement, states=settings["states"])  # type: ignore[misc, assignment]
    config = PruneConfig(**{**SETTINGS, **settings.get("config", {})})
    with logged() as told:
        report = prune(STORIES, out, config, progress=progress, group=group, resume=True, command="the command")
    return {"steps": steps, "told": told, "kept": _kept(report.layers), "plan": report.plan}


def _kept(layers: list[dict[str, Any]]) -> list[Any]:
    return [[layer["kept_heads"], layer["kept_kv_heads"], layer["kept_channels"]] for layer in layers]


def _prune_with(group: Any, out: str, stop: list[Any] | None, settings: dict[str, Any]) -> Any:
    return _prune(group, out, stop, **settings)


def assert_close(folder: Path, other: Path) -> None:
    """The same checkpoint up to rounding."""
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for path in folder.glob("*.safetensors"):
        tensors, others = load_file(path), load_file(other / path.name)
        for name, tensor in tensors.items():
            assert float((tensor - others[name]).norm()) <= 1e-4 * float(tensor.norm()), name
    reports = [json.loads((one / "report.json").read_text()) for one in (folder, other)]
    assert _kept(reports[0]["layers"]) == _kept(reports[1]["layers"])
    for key in ("perplexity_dense", "perplexity_pruned"):
        assert reports[0]["calibration"][key] == pytest.approx(reports[1]["calibration"][key], rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"recovery": "lstsq", "head_unit": "query"},
        pytest.param({"preset": "paper", "recovery": "none"}, marks=pytest.mark.slow),
        {"preset": "best"},
        {"criterion": "flap", "allocation": "flap", "recovery": "bias"},
    ],
)
@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_as_one_process(tmp_path: Path, size: int, settings: dict[str, Any]) -> None:
    found = results(_prune_with, size, tmp_path / "world", str(tmp_path / "out"), None, {"config": settings})
    assert all(one["kept"] == found[0]["kept"] and one["steps"] == 10 for one in found)
    assert found[0]["told"] and not any(one["told"] for one in found[1:])
    prune(STORIES, tmp_path / "one", PruneConfig(**{**SETTINGS, **settings}))
    assert_close(tmp_path / "one", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out", "world"]


def test_heads_of_few_tokens(tmp_path: Path) -> None:
    """Their statistics add up, and all ranks stream what the first one chooses."""
    results(_prune_with, 2, tmp_path / "world", str(tmp_path / "out"), None, {"heads": True})
    report = PruneReport.read(tmp_path / "out")
    assert {layer.get("attention_statistics", "heads") for layer in report.layers} == {"heads"}
    prune(STORIES, tmp_path / "one", PruneConfig(**SETTINGS))  # by the Gram
    assert_close(tmp_path / "one", tmp_path / "out")


def _prune_in_memory(group: Any, out: str, windows: int = 5, different: bool = False) -> Any:
    rank = Ranks(group).rank
    model = random_llama()
    ids = torch.randint(128, (windows, 16), generator=torch.Generator().manual_seed(rank if different else 0))
    report = prune_model(model, ids, PruneConfig(0.3, "slimllm"), group=group)
    save_file(model.state_dict(), f"{out}-{rank}")
    return [_kept(report.layers), {key: round(value, 2) for key, value in report.calibration.items() if "perp" in key}]


def test_a_model_in_memory(tmp_path: Path) -> None:
    """Hard activations: means far larger than the spread, dead and dominating channels."""
    found = results(_prune_in_memory, 2, tmp_path / "world", str(tmp_path / "model"))
    assert found == [_prune_in_memory(None, str(tmp_path / "one"))] * 2
    one, first, second = (load_file(tmp_path / name) for name in ("one-0", "model-0", "model-1"))
    for name, tensor in one.items():
        assert torch.allclose(tensor, first[name], rtol=1e-3, atol=1e-3 * float(tensor.abs().max())), name
        assert torch.equal(first[name], second[name]), name


def test_a_model_in_memory_is_the_same_for_all(tmp_path: Path) -> None:
    few = World(_prune_in_memory, 2, tmp_path / "few", str(tmp_path / "model"), 1).results(30)
    assert few[0]["error"].startswith("InputError: 1 calibration windows cannot be shared by 2") and few[1]["error"]
    other = World(_prune_in_memory, 2, tmp_path / "other", str(tmp_path / "model"), 5, True).results(30)
    assert other[0]["error"].startswith("InputError: Rank 1 has another calibration text") and other[1]["error"]


def _prune_twice(group: Any, out: str) -> Any:
    reports = prune_ratios(
        STORIES, out, PruneConfig(**SETTINGS), [0.2, 0.4], group=group, resume=True, command="the command"
    )
    return [report.dense_pass_shared for report in reports]


@pytest.mark.slow
def test_ratios(tmp_path: Path) -> None:
    assert results(_prune_twice, 2, tmp_path / "world", str(tmp_path / "out")) == [[False, True]] * 2
    before = contents(tmp_path / "out")
    assert results(_prune_twice, 2, tmp_path / "again", str(tmp_path / "out")) == [[False, True]] * 2  # complete already
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("stop", "states", "choice"),
    [
        pytest.param(["dense", 2], "device", {}, marks=pytest.mark.slow),
        (["prune", 1], "disk", {"recovery": "lstsq"}),
        (["prune", 1], "device", {"criterion": "flap", "recovery": "bias"}),
    ],
)
def test_resume(tmp_path: Path, stop: list[Any], states: str, choice: dict[str, Any]) -> None:
    """On as many ranks to the last bit, on others to rounding."""
    settings: dict[str, Any] = {"states": states, "config": choice}
    results(_prune_with, 2, tmp_path / "whole", str(tmp_path / "expected"), None, settings)
    for out in ("two", "three", "one"):
        stopped = World(_prune_with, 2, tmp_path / f"world-{out}", str(tmp_path / out), stop, settings).results()
        assert all("stopped here" in one["error"] for one in stopped), stopped
        assert not (tmp_path / out).exists()
    resumed = results(_prune_with, 2, tmp_path / "world", str(tmp_path / "two"), None, settings)
    assert any("Resuming after layer" in sentence for sentence in resumed[0]["told"]) and resumed[1]["steps"] < 10
    assert contents(tmp_path / "two") == contents(tmp_path / "expected")
    assert resumed[1]["plan"]["states"] == states
    resumed = results(_prune_with, 3, tmp_path / "world-3", str(tmp_path / "three"), None, settings)
    assert any("was begun with ranks 2" in sentence for sentence in resumed[0]["told"])
    assert_close(tmp_path / "expected", tmp_path / "three")
    assert _prune_with(None, str(tmp_path / "one"), None, {"config": choice})["steps"] < 10
    assert_close(tmp_path / "expected", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank(tmp_path: Path, victim: int) -> None:
    results(_prune_with, 3, tmp_path / "whole", str(tmp_path / "expected"), None, {})
    world = World(_prune_with, 3, tmp_path / "world", str(tmp_path / "out"), None, {"slowly": True})
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    while not journal.exists() or len(journal.read_bytes().splitlines()) < 3:
        time.sleep(0.01)
        assert world.processes[victim].is_alive()
    world.processes[victim].kill()
    found = world.results(30)  # and does not wait for the 60 s of the group
    assert found.pop(victim) is None
    assert all(one["error"].startswith("LostRankError: Another process of this run has ended") for one in found), found
    assert not (tmp_path / "out").exists()
    results(_prune_with, 3, tmp_path / "again", str(tmp_path / "out"), None, {})
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


@pytest.mark.slow
def test_a_rank_that_hangs(tmp_path: Path) -> None:
    world = World(_prune_with, 2, tmp_path / "world", str(tmp_path / "out"), None, {"slowly": True}, seconds=5)
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    while not journal.exists() or len(journal.read_bytes().splitlines()) < 2:
        time.sleep(0.01)
        assert world.processes[0].is_alive()
    os.kill(world.processes[1].pid or 0, signal.SIGSTOP)
    world.processes[0].join(30)
    assert world.processes[0].exitcode is not None
    assert "LostRankError" in json.loads((tmp_path / "world" / "result-0").read_text())["error"]
    world.processes[1].kill()


class _Failing(Criterion):
    """A mistake in a plug-in, in the first process, which alone calls it."""

    def scores(self, sublayer: Sublayer, statistics: SublayerStatistics) -> torch.Tensor:
        raise RuntimeError("a mistake")


class _Noise(Recovery):
    """Another bias in every process."""

    def fit(self, sublayer: Sublayer, statistics: SublayerStatistics, kept: torch.Tensor) -> Fit:
        moments = statistics.moments(kept)
        noise = torch.full_like(moments.mean_y, 0.1 * statistics.ranks.rank)
        return Fit.of_moments(moments, torch.ones_like(noise), noise)


def _prune_with_noise(group: Any, out: str) -> Any:
    recovery = register_recovery("noise")(_Noise)()
    report = prune(STORIES, out, PruneConfig(**SETTINGS, recovery=recovery), group=group)
    return report.calibration["perplexity_pruned"]


def test_the_first_ones_recovery_holds_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the model that is written would not be the one that was measured."""
    found = World(_prune_with_noise, 2, tmp_path / "world", str(tmp_path / "out")).results()
    monkeypatch.setattr(RECOVERIES, "_found", dict(RECOVERIES.all()))
    recovery = register_recovery("noise")(_Noise)()
    alone = prune(STORIES, tmp_path / "alone", PruneConfig(**SETTINGS, recovery=recovery))
    wanted = pytest.approx(alone.calibration["perplexity_pruned"], rel=1e-4)
    assert [one["result"] for one in found] == [wanted] * 2


def _prune_differently(group: Any, out: str, what: str) -> Any:
    rank = Ranks(group).rank
    settings, gone = dict(SETTINGS), None
    if what == "seed":
        settings["seed"] = rank
    elif what == "model" and rank:
        return prune(out + "-nothing", out, PruneConfig(**settings), group=group).out
    elif what in ("weights", "unreadable") and rank:
        other = Path(out).parent / "world" / "other"
        shutil.copytree(STORIES, other)
        path = other / "model.safetensors"
        if what == "weights":
            tensors = load_file(path)
            tensors["model.layers.3.mlp.up_proj.weight"][0, 0] += 0.5
            save_file(tensors, path, metadata={"format": "pt"})
        else:
            gone = lambda *step: path.unlink(missing_ok=True)  # noqa: E731
        return prune(other, out, PruneConfig(**settings), group=group, progress=gone).out
    elif what == "samples":
        settings["samples"] = 1
    elif what == "criterion":
        settings["criterion"] = register_criterion("failing")(_Failing)()
    elif what == "shard":
        settings["samples"] = 6  # so that a state is smaller than a shard
    if what == "shard" and rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (182_000, resource.RLIM_INFINITY))
    return prune(STORIES, out, PruneConfig(**settings), group=group).out


@pytest.mark.parametrize(
    ("what", "first", "second"),
    [
        ("seed", "InputError: Rank 1 has another seed (1) than rank 0 (0)", "OtherRankError: Rank 0: Rank 1 has another s"),
        ("weights", "InputError: Rank 1 has other weights in layer 3", "OtherRankError: Rank 0: Rank 1 has other weights"),
        ("unreadable", "OtherRankError: Rank 1: Shard", "InputError: Shard"),
        ("model", "OtherRankError: Rank 1: There is no", "InputError: There is no"),
        ("samples", "InputError: 1 calibration windows cannot be shared by 2 processes", "OtherRankError: Rank 0: 1 calib"),
        ("shard", "OutputError: Writing", "OtherRankError: Rank 0: Writing"),
        ("out", "InputError: The output folder", "OtherRankError: Rank 0: The output folder"),
        ("criterion", "MethodError: The method failing failed in the", "OtherRankError: Rank 0: The method failing"),
    ],
)
def test_an_error_of_one_is_one_of_all(tmp_path: Path, what: str, first: str, second: str) -> None:
    if what == "out":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").touch()
    found = World(_prune_differently, 2, tmp_path / "world", str(tmp_path / "out"), what).results()
    assert found[0]["error"].startswith(first) and found[1]["error"].startswith(second), found
    begun = what in ("weights", "unreadable", "shard")
    left = {"out": ["out", "world"]}.get(what, [".out.partial", "world"] if begun else ["world"])
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def torchrun(folder: Path, *arguments: str, size: int = 2) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(size),
        "-m",
        "slimllm",
    ]
    command += ["prune", str(STORIES), "--out", "out", "--ratio", "0.3", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True, env={**os.environ, "COLUMNS": "200"})


def test_torchrun(tmp_path: Path) -> None:
    out, err = torchrun(
        tmp_path, "--preset", "slimllm", "--samples", "11", "--seq-len", "64", "--batch-size", "3"
    ).communicate(timeout=120)
    assert out.count("parameters of the layers") == 1, err
    (tmp_path / "out" / "report.html").unlink()  # which the command writes, once
    shutil.rmtree(tmp_path / "out" / "report")
    prune(STORIES, tmp_path / "one", PruneConfig(**SETTINGS))
    assert_close(tmp_path / "one", tmp_path / "out")
    failed = torchrun(tmp_path, "--samples", "11")  # the folder is there now
    _, err = failed.communicate(timeout=120)
    assert failed.returncode and err.count("Error: The output folder") == 1 and "exitcode  : 2" in err


@pytest.mark.slow
def test_torchrun_is_stopped_and_goes_on(tmp_path: Path) -> None:
    arguments = ["--samples", "100", "--seq-len", "512", "--batch-size", "1"]
    running = torchrun(tmp_path, *arguments)
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    while not journal.exists() or len(journal.read_bytes().splitlines()) < 3:
        time.sleep(0.02)
        assert running.poll() is None
    running.terminate()
    out, err = running.communicate(timeout=60)
    assert "Stopping after this layer" in err and "--resume continues from here" in err, err
    out, err = torchrun(tmp_path, *arguments, "--resume").communicate(timeout=120)
    assert "Resuming after layer" in out and [path.name for path in tmp_path.iterdir()] == ["out"], err
