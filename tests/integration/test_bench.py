"""Measuring throughput: checkpoints to measure with, counted work, rows, pictures, tables, the plain algorithm."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import STORIES
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

import slimllm
from slimllm import InputError
from slimllm.checkpoints.opening import open_checkpoint
from slimllm.checkpoints.source import CheckpointModel
from slimllm.experiments.bench import Setting, measure
from slimllm.experiments.bench.display import run_bench
from slimllm.experiments.bench.plot import _fit, _medians, _series, draw
from slimllm.experiments.bench.run import append_rows, check_results_file, read_rows
from slimllm.experiments.bench.shapes import SHAPES
from slimllm.experiments.bench.synthetic import FirstLayers, RandomCheckpoint
from slimllm.experiments.bench.work import Rates, Work, stage_work
from slimllm.methods.allocation.layer_importance import LayerImportance
from slimllm.runtime.stopwatch import Stopwatch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def load_script(name: str) -> ModuleType:
    __import__(name)
    return sys.modules[name]


def test_random_weights_are_seeded_and_of_full_rank() -> None:
    one, same, other = (RandomCheckpoint(SHAPES["smollm2-135m"], 1, seed) for seed in (0, 0, 1))
    name = "model.layers.0.mlp.gate_proj.weight"
    weight = one.read([name])[name]
    assert weight.shape == (1536, 576) and weight.dtype == torch.bfloat16
    assert torch.equal(weight, same.read([name])[name]) and not torch.equal(weight, other.read([name])[name])
    assert torch.linalg.matrix_rank(weight.float()) == 576
    assert abs(float(weight.float().std()) * 576**0.5 - 1) < 0.01
    # Longer than the numbers that are repeated, and still no two rows are equal.
    table = one.read(["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    assert len(torch.unique(table[:, :8].float(), dim=0)) == len(table)
    assert (one.read(["model.norm.weight"])["model.norm.weight"] == 1).all()
    with pytest.raises(InputError, match="random weights and no tokenizer; give token ids"):
        one.tokenizer()


def test_random_weights_on_disk_are_those_in_memory(tmp_path: Path) -> None:
    made = RandomCheckpoint(SHAPES["smollm2-135m"], 2)
    made.write(tmp_path / "model")
    written = open_checkpoint(tmp_path / "model")
    assert written.shapes() == made.shapes()
    for name in ("model.layers.1.self_attn.o_proj.weight", "model.embed_tokens.weight"):
        assert torch.equal(written.read([name])[name], made.read([name])[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_first_layers(tmp_path: Path) -> None:
    """They are pruned as the whole model's first layers would be, and the result is a model of so many layers."""
    token_ids = torch.randint(512, (2, 32), generator=torch.Generator().manual_seed(0))
    config = slimllm.PruneConfig(0.3, "slimllm", calibration=token_ids, allocation=LayerImportance(pruned_layers=2))
    slimllm.prune(STORIES, tmp_path / "pruned", slimllm.PruneConfig(0.3, "slimllm", calibration=token_ids))
    for model, layers in ((STORIES, 2), (tmp_path / "pruned", 2)):
        first = FirstLayers(open_checkpoint(model), layers)
        assert first.config.num_hidden_layers == layers
        report = slimllm.prune(first, tmp_path / f"out-{Path(model).name}", config)
        assert [layer["index"] for layer in report.layers] == [0, 1] and abs(report.achieved_ratio - 0.3) < 0.02
        loaded, _ = slimllm.load(tmp_path / f"out-{Path(model).name}", device="cpu")
        assert loaded.config.num_hidden_layers == layers and loaded(token_ids).logits.isfinite().all()
    for layers in (0, 6):
        with pytest.raises(InputError, match=f"layers must be from 1 to 5, got {layers}"):
            FirstLayers(open_checkpoint(STORIES), layers)


@pytest.mark.skipif(torch.__version__ < "2.9", reason="torch before 2.9 counts its attention in other products")
@torch.no_grad()
def test_counted_operations_are_those_of_the_products(tmp_path: Path) -> None:
    """The dense pass and the pruning pass, against PyTorch's own counter; attention by hand, of which half is causal."""
    token_ids = torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(0))
    config = slimllm.PruneConfig(0.3, "slimllm", calibration=token_ids)
    checkpoint = open_checkpoint(STORIES)
    report = slimllm.prune(checkpoint, tmp_path / "out", config)
    sizes = CheckpointModel(checkpoint, torch.device("cpu"), torch.float32).sizes()
    work = stage_work(vars(report), sizes, 64, 8, 4.0)
    model, _ = slimllm.load(STORIES, device="cpu")
    with FlopCounterMode(display=False) as counter:
        model.model(token_ids)
    counted = counter.get_flop_counts()["Global"]
    products = sum(count for operation, count in counted.items() if "mm" in str(operation))
    assert work["dense pass"].operations == products + 5 * 2 * 128 * 64 * 64
    pruned, _ = slimllm.load(tmp_path / "out", device="cpu")
    with FlopCounterMode(display=False) as counter:
        pruned.model(token_ids)
    smaller = sum(count for operation, count in counter.get_flop_counts()["Global"].items() if "mm" in str(operation))
    # The dense projections into the sub-layers, the pruned ones out of them, and the FFN's dense output where it is pruned.
    out = sum(
        2 * 128 * 64 * (layer["num_heads"] * 8 + layer["intermediate_size"] + 172 * (layer["intermediate_size"] < 172))
        for layer in report.layers
    )
    into = products - 5 * 2 * 128 * 64 * (64 + 172)
    assert work["forward"].operations == into + out + 5 * 2 * 128 * 64 * 64
    assert smaller < work["forward"].operations
    assert work["read"].num_bytes == 2 * 4 * report.parameters["layers_before"]
    assert work["write"].num_bytes == 2 * report.parameters["layers_after"]


@pytest.mark.parametrize(
    ("settings", "windows", "outputs"),
    [({"criterion": "flap", "recovery": "bias"}, 16, None), ({"preset": "best"}, 16, (64, 172)), ({}, 12, (0, 172))],
)
def test_counted_operations_of_other_runs(
    tmp_path: Path, settings: dict[str, Any], windows: int, outputs: tuple[int, int] | None
) -> None:
    """One pass has no forward passes while pruning; token weights take the dense output of all that is pruned."""
    given = {"calibration": torch.randint(512, (16, 64), generator=torch.Generator().manual_seed(0))} | settings
    report = slimllm.prune(STORIES, tmp_path / "out", slimllm.PruneConfig(**{"ratio": 0.3, "preset": "slimllm", **given}))
    sizes = CheckpointModel(open_checkpoint(STORIES), torch.device("cpu"), torch.float32).sizes()
    work = stage_work(vars(report), sizes, 64, 8, 4.0)
    attention, into_ffn = 2 * 64 * (64 + 2 * 32) + 2 * 64 * 64, 2 * 2 * 64 * 172
    assert report.calibration["dense_windows"] == windows
    assert work["dense pass"].operations == 5 * windows * 64 * (attention + into_ffn + 2 * 64 * (64 + 172))
    of_attention, of_ffn = outputs or (0, 0)
    wanted = sum(
        attention
        + into_ffn
        + 2 * 64 * (layer["num_heads"] * 8 + layer["intermediate_size"])
        + 2 * 64 * (of_attention * (layer["num_heads"] < 8) + of_ffn * (layer["intermediate_size"] < 172))
        for layer in report.layers
    )
    assert work["forward"].operations == (16 * 64 * wanted if outputs else 0)


def test_floors() -> None:
    rates = Rates(operations_per_s=100.0, single_per_s=50.0, precise_per_s=10.0, bytes_per_s=1000.0)
    assert rates.floor_s(Work(200.0, 50.0, 30.0, 4000.0)) == 6.0  # computing
    assert rates.floor_s(Work(200.0, num_bytes=4000.0)) == 4.0  # moving
    assert rates.floor_s(Work(1.0) + Work(2.0, 1.0, 3.0, 4.0)) == pytest.approx(0.35)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """Two real runs, as rows of a file."""
    path = tmp_path_factory.mktemp("bench") / "sub" / "results.jsonl"
    append_rows(path, [measure(Setting(str(STORIES), layers=2, samples=4, recovery="lstsq"))])
    append_rows(path, [measure(Setting("smollm2-135m", layers=1, samples=2, seq_len=16), path.parent)])
    assert [file.name for file in path.parent.iterdir()] == ["results.jsonl"]  # what was written is deleted
    return read_rows(path)


def test_a_measured_row(rows: list[dict[str, object]]) -> None:
    for row, layers, weights, tokens in zip(rows, (2, 1), ("safetensors", "generated"), (512, 32)):
        assert row["num_layers"] == layers and row["weights"] == weights and row["machine"] and row["date"]
        stages, floors = row["stages_s"], row["floors_s"]
        assert {stage for stage, floor in floors.items() if floor} <= set(stages) and all(
            value > 0 for value in stages.values()
        )
        assert sum(stages.values()) <= row["elapsed_s"] < 2 * sum(stages.values()) + 1
        assert 0 < row["floor_s"] < row["elapsed_s"] and row["times_floor"] == row["elapsed_s"] / row["floor_s"]
        assert row["tokens_per_s"] == pytest.approx(tokens / row["elapsed_s"])
        assert 0.1 < row["peak_host_gib"] < 4 and row["peak_gpu_gib"] == 0
        assert row["parameters_per_s"] == pytest.approx(row["parameters"]["layers_before"] / row["elapsed_s"])
    assert rows[1]["parameters"]["layers_before"] == 576 * (2 * 576 + 2 * 192 + 3 * 1536 + 2)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_pictures(rows: list[dict[str, object]], tmp_path: Path, suffix: str) -> None:
    more = [{**rows[0], "samples": samples, "elapsed_s": 1.0 + samples} for samples in (8, 16, 32)]
    draw([*rows, *more, {"old": "row"}], tmp_path / f"a.{suffix}")
    content = (tmp_path / f"a.{suffix}").read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == "png" else b"<?xml") and len(content) > 10_000
    with pytest.raises(InputError, match=r"\.png or \.svg file, got a\.jpg"):
        draw(rows, tmp_path / "a.jpg")
    with pytest.raises(InputError, match="no measured run to draw"):
        draw([{"old": "row"}], tmp_path / "b.png")


def test_curves_keep_apart_what_differs(rows: list[dict[str, Any]]) -> None:
    base = rows[0]
    tokens = [{**base, "samples": samples, "elapsed_s": 1.0 + samples} for samples in (8, 16, 32)]
    other = [{**row, "preset": "paper", "elapsed_s": 9.0} for row in tokens]
    curves = _series([*tokens, *other], "tokens")
    points = [(samples * 128.0, 1.0 + samples) for samples in (8, 16, 32)]
    assert sorted(curves.values()) == sorted([points, [(at, 9.0) for at, _ in points]]) and len(curves) == 2
    picked = _medians(
        [
            {**tokens[0], "elapsed_s": seconds, "commit": commit}
            for commit, seconds in (("a", 1.0), ("b", 9.0), ("b", 5.0), ("b", 7.0))
        ]
    )
    assert [row["elapsed_s"] for row in picked] == [7.0]
    assert "R² = 1.0000" in _fit(points, "calibration tokens") and "1.00 s + 7.81 s/1000 tokens" in _fit(points, "tokens")
    # A layer's time: of models of as many layers, without the perplexity.
    deep = {**base, "num_layers": 4}
    wide = {**base, "parameters": {"layers_before": 4 * base["parameters"]["layers_before"]}}
    (points,) = _series([base, deep, wide], "width").values()
    seconds = (base["elapsed_s"] - base["stages_s"]["perplexity"]) / 2
    assert [at for _, at in points] == [seconds, seconds] and points[1][0] == pytest.approx(2 * points[0][0])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (Setting("llama-7b", layers=33), "layers must be from 1 to 32, got 33"),
        (Setting("llama-7b", layers=0), "layers must be at least 1, got 0"),
        (Setting("smollm2-135m", samples=0), "samples must be at least 1, got 0"),
        (Setting("llama-7b", ratio=1.5, on_disk=True), "must lie between 0 and 1, got 1.5"),
        (Setting(str(STORIES), on_disk=True), "is on disk already"),
        (Setting("nowhere/at-all"), "The names of shapes are llama-7b, "),
    ],
)
def test_settings_that_cannot_be(setting: Setting, message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure(setting)


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ([], {}, "Give a model or the name of a shape"),
        (["llama-7b"], {"rounds": 0}, "rounds must be at least 1, got 0"),
        (["llama-7b"], {"workdir": Path("none")}, "The working folder none does not exist"),
        (["llama-7b"], {"plot": Path("a.jpg")}, r"\.png or \.svg file, got a\.jpg"),
        ([], {"plot": Path("a.png")}, "There is no file none"),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(models: list[str], options: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"rounds": 1, "workdir": None, "plot": None, **options}
    with pytest.raises(InputError, match=message):
        run_bench(Console(), models, layers=[None], ratio=[0.2], methods=[{}], samples=[32], out=Path("none"), **settings)
    assert not Path("none").exists()


def test_a_killed_run_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    bystander = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    bystander.start()  # a process of the caller's own, which is left alone

    def kill() -> None:
        while not (children := [child for child in multiprocessing.active_children() if child is not bystander]):
            time.sleep(0.05)
        os.kill(children[0].pid or 0, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(InputError, match="was killed, probably because memory ran out"):
        measure(Setting(str(STORIES)), tmp_path)
    killer.join()
    assert not list(tmp_path.iterdir()) and bystander.is_alive()
    bystander.kill()


def test_results_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_results_file(tmp_path / "file")
    check_results_file(tmp_path / "new" / "folder" / "rows.jsonl")
    for path in (tmp_path, tmp_path / "file" / "rows.jsonl"):
        with pytest.raises(InputError, match="cannot be written; give another one"):
            check_results_file(path)


def test_rows_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no file"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n3\n')
    with pytest.raises(InputError, match=r"Line 2 of .* is not a row"):
        read_rows(tmp_path / "bad.jsonl")


@pytest.mark.parametrize(("width", "tokens"), [(256, 700), (512, 1100)])
def test_the_plain_algorithm_chooses_the_same(benchmarks: None, width: int, tokens: int) -> None:
    naive, bench = load_script("naive"), load_script("bench_naive")
    device = torch.device("cpu")
    activations, weights = bench.make_layer(width, tokens, device)
    heads, channels = bench.SIZES[width]
    numbers = (heads, heads // 2, channels // 3)
    got = bench.engine(activations, weights, *numbers, Stopwatch(device))
    assert got == naive.prune_layer(*activations, weights, *numbers)
    assert len(got[0]) == heads - heads // 2 and len(got[1]) == channels - channels // 3


def test_tables_are_up_to_date(benchmarks: None) -> None:
    tables = load_script("tables")
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.fill(text) == text, f"{page.name}: run make tables"
    assert "<!-- table summary -->" in tables.PAGES[0].read_text(encoding="utf-8")
    assert "<!-- table prune -->" in tables.PAGES[1].read_text(encoding="utf-8")


def test_tables_take_the_newest_commit_of_a_setting(
    benchmarks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = load_script("tables")
    monkeypatch.setattr(load_script("rows"), "RESULTS", tmp_path)
    row = {
        "device": "cpu",
        "num_heads": 4,
        "intermediate_size": 704,
        "tokens": 4096,
        "naive_s": 3.0,
        "engine_gib": 0.1,
        "naive_gib": 0.4,
        "memory_ratio": 4.0,
    }
    rows = [
        {**row, "commit": commit, "hidden_size": hidden, "engine_s": seconds, "speedup": 3.0 / seconds}
        for commit, hidden, seconds in (("a", 512, 9.0), ("a", 256, 5.0), ("b", 256, 1.0), ("b", 256, 3.0), ("b", 256, 2.0))
    ]
    (tmp_path / "naive.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = tables.naive_table().splitlines()
    assert [line.split(" | ")[4] for line in lines[2:]] == ["2.000 s", "9.000 s"]  # by width; medians of the newest
    page = "before\n<!-- table naive -->\nold\n<!-- end -->\nafter"
    assert tables.fill(page) == f"before\n<!-- table naive -->\n{tables.naive_table()}\n<!-- end -->\nafter"
