"""The plan of a run: that it fits the budget, that the budget does not change the result, that it is near the truth."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call
from conftest import STORIES, config
from gguf_files import write_gguf
from safetensors.torch import load_file
from transformers import PreTrainedModel

from slimllm import InputError, PruneConfig, prune, prune_model
from slimllm.checks import GIB, parse_bytes
from slimllm.experiments.bench.forecast import forecast
from slimllm.experiments.bench.run import Setting, measure
from slimllm.pruning.memory_estimate import Sizes, traffic
from slimllm.pruning.plan import make_plan
from slimllm.runtime.hidden_states import PLACES, Placement, Stored

LLAMA_33B = Sizes(
    hidden_size=6656,
    vocab_size=32000,
    attention_width=6656,
    kv_width=6656,
    num_heads=52,
    num_kv_heads=52,
    intermediate_size=17920,
    layer_params=535_000_000,
    params=32_500_000_000,
    stored=2,
    computed=4,
    written=2,
    samples=32,
    seq_len=128,
    held_out=4,
    on_gpu=False,
)


def test_amounts_of_memory() -> None:
    assert parse_bytes("host_memory", "8GiB") == 8 * GIB and parse_bytes("host_memory", " 1.5 gb") == 1.5e9
    assert parse_bytes("host_memory", "8G") == 8 * GIB and parse_bytes("host_memory", None) == float("inf")
    for wrong in ("8", "8X", "-1GiB", "0GiB", "much"):
        with pytest.raises(InputError, match=r"host_memory is an amount of memory with its unit, such as 16GiB, got"):
            PruneConfig(0.2, "slimllm", host_memory=wrong)


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("samples", [8, 4096])
@pytest.mark.parametrize("choice", [{"preset": "slimllm"}, {"preset": "slimllm", "recovery": "lstsq"}, {"preset": "best"}])
def test_a_budget_is_kept_or_the_least_one_named(on_gpu: bool, samples: int, choice: dict[str, str]) -> None:
    sizes = dataclasses.replace(LLAMA_33B, samples=samples, on_gpu=on_gpu, computed=2 if on_gpu else 4)
    settings = PruneConfig(ratio=0.2, **choice)
    free = make_plan(sizes, settings, GIB / 2, GIB / 2)
    assert not free.choices and free.placement == Placement(read_ahead=on_gpu)
    which, peak = ("gpu_memory", "peak_gpu") if on_gpu else ("host_memory", "peak_host")
    needed, used = getattr(free, peak), []
    for part in (1.0, 0.95, 0.9, 0.8, 0.6, 0.4, 0.2, 0.1, 0.01):
        budget = f"{part * needed / GIB:.3f}GiB"
        try:
            plan = make_plan(sizes, dataclasses.replace(settings, **{which: budget}), GIB / 2, GIB / 2)
        except InputError as error:
            least = str(error).split("give ")[1].split(" ")[0]
            assert which in str(error) and parse_bytes("x", least) > parse_bytes("x", budget)
            make_plan(sizes, dataclasses.replace(settings, **{which: least}), GIB / 2, GIB / 2)
            break
        assert getattr(plan, peak) <= parse_bytes("x", budget) * (1 + 1e-9)
        used.append(plan.choices)
    else:
        pytest.fail("a hundredth of what is needed was enough")
    assert len(used) > 1 or samples == 8


def test_only_what_is_needed_is_chosen() -> None:
    """Of hidden states that fill the memory, files help, and nothing else has to be given up for it."""
    sizes = dataclasses.replace(LLAMA_33B, samples=2048)
    plan = make_plan(sizes, PruneConfig(0.2, "slimllm", host_memory="9GiB"), GIB / 2)
    assert plan.choices == ["hidden states are stored in files"] and plan.peak_host < 9 * GIB


def test_a_large_regression_moves_to_the_host() -> None:
    """Where a GPU cannot hold the Gram of all channels, and only with the recovery that has one."""
    sizes = dataclasses.replace(LLAMA_33B, on_gpu=True, computed=2)
    plan = make_plan(sizes, PruneConfig(0.2, "slimllm", recovery="lstsq", gpu_memory="7GiB"), GIB / 2, GIB / 2)
    assert plan.placement.gram == "host" and plan.placement.systems == "device" and plan.peak_gpu < 7 * GIB
    less = make_plan(sizes, PruneConfig(0.2, "slimllm", recovery="lstsq", gpu_memory="4GiB"), GIB / 2, GIB / 2)
    assert less.placement.solves_on_host and less.peak_gpu < 4 * GIB < plan.peak_gpu
    for preset in ("slimllm", "best"):  # on the GPU altogether
        on_gpu = make_plan(sizes, PruneConfig(ratio=0.2, preset=preset, gpu_memory="8GiB"), GIB / 2, GIB / 2)
        assert on_gpu.placement.gram == "device" and on_gpu.peak_gpu < 8 * GIB
    free = make_plan(sizes, PruneConfig(0.2, "slimllm", recovery="lstsq"), GIB / 2, GIB / 2)
    on_cpu = make_plan(dataclasses.replace(sizes, on_gpu=False), PruneConfig(ratio=0.2, preset="best"), GIB / 2)
    budget = f"{(on_cpu.peak_host - 0.8 * 17920**2 * 4) / GIB:.2f}GiB"
    settings = PruneConfig(ratio=0.2, preset="best", host_memory=budget)
    smaller = make_plan(dataclasses.replace(sizes, on_gpu=False), settings, GIB / 2)
    assert smaller.placement.gram == "disk" and smaller.disk["file of the Gram"] == 17920**2 * 4
    assert free.placement.gram == "device" and plan.peak_host > free.peak_host + 17920**2 * 4
    assert make_plan(sizes, PruneConfig(0.2, "slimllm", gpu_memory="8GiB"), GIB / 2, GIB / 2).placement.gram == "device"


def test_what_ranks_share() -> None:
    sizes = dataclasses.replace(LLAMA_33B, samples=256)
    for recovery in ("affine", "lstsq"):
        settings = PruneConfig(0.2, "slimllm", recovery=recovery, samples=256)
        one, four = (make_plan(dataclasses.replace(sizes, ranks=ranks), settings, GIB / 2) for ranks in (1, 4))
        assert one.peak_host > four.peak_host and one.disk == four.disk
        moved = [traffic(dataclasses.replace(sizes, ranks=ranks), settings) for ranks in (1, 2, 1000)]
        assert not any(moved[0].values()) and moved[1]["Grams"] * 1.998 == pytest.approx(moved[2]["Grams"])
        grams = 4 * (6656**2 + (17920 if recovery == "lstsq" else 6656) ** 2)
        assert moved[1]["Grams"] == grams  # a sum over two ranks: each sends it once
    windows = 96 + 256 + 2 * 4  # of the dense pass, of the pruning, and those held out of both; half are the other rank's
    assert moved[1]["hidden states"] == windows / 2 * 128 * 6656 * 4


def test_explicit_settings_are_not_overruled() -> None:
    settings = PruneConfig(0.2, "slimllm", batch_size=8, host_memory="16GiB")
    assert make_plan(LLAMA_33B, settings, GIB / 2).config == settings
    with pytest.raises(InputError, match="gpu_memory is a budget for a GPU, but the device is a CPU"):
        make_plan(LLAMA_33B, PruneConfig(0.2, "slimllm", gpu_memory="8GiB"), GIB / 2)


@pytest.mark.parametrize("place", PLACES)
def test_stored(place: str, tmp_path: Path) -> None:
    first, second = torch.randn(3, 4, 5).bfloat16(), torch.randn(3, 4, 5).bfloat16()
    stored = Stored(first.clone(), place, tmp_path)
    assert torch.equal(stored.load(), first) and stored.shape == first.shape and not list(tmp_path.iterdir())
    stored.save(second)
    assert torch.equal(stored.load(), second) and torch.equal(stored.stored(), second)
    stored.save(stored.load().add_(1))
    assert torch.equal(stored.load(), second + 1)


@pytest.mark.parametrize("choice", [{"preset": "slimllm"}, {"preset": "slimllm", "recovery": "lstsq"}, {"preset": "best"}])
@pytest.mark.parametrize(
    "placement",
    [
        {"read_ahead": True},
        {"states": "host"},
        {"gram": "host"},
        {"gram": "disk"},
        {"states": "disk"},
        {"states": "disk", "keep_inner_bytes": 0},
    ],
)
def test_the_result_does_not_depend_on_where_things_live(
    token_ids: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    choice: dict[str, str],
    placement: dict[str, object],
) -> None:
    settings = config(token_ids, batch_size=7, **choice)
    prune(STORIES, tmp_path / "free", settings)

    def placed(**rest: Any) -> Placement:
        return Placement(**{**rest, **placement})

    monkeypatch.setattr("slimllm.pruning.plan.Placement", placed)
    report = prune(STORIES, tmp_path / "placed", settings)
    assert report.plan["states"] == placement.get("states", "device")
    for path in (tmp_path / "free").glob("*.safetensors"):
        placed_path = tmp_path / "placed" / path.name
        if path.read_bytes() == placed_path.read_bytes():
            continue
        # Made again by the sliced layer, or summed by tiles: other roundings.
        assert "keep_inner_bytes" in placement or placement == {"gram": "disk"}, path.name
        tensors, others = load_file(path), load_file(placed_path)
        assert all(torch.allclose(tensors[name], others[name], rtol=1e-3, atol=1e-4) for name in tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["free", "placed"]


def test_a_run_within_its_budget(token_ids: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"host_memory is 1MiB, but this run takes .* GiB at least \(in the phase"):
        prune(STORIES, tmp_path / "out", config(token_ids, host_memory="1MiB"))
    assert not list(tmp_path.iterdir())
    report = prune(STORIES, tmp_path / "out", config(token_ids, host_memory="64GiB"))
    assert report.plan["choices"] == [] and report.config["host_memory"] == "64GiB"


def test_a_model_in_memory_has_no_budget(token_ids: torch.Tensor, stories: object) -> None:
    with pytest.raises(InputError, match="host_memory does not apply"):
        prune_model(stories, token_ids, PruneConfig(0.2, "slimllm", host_memory="8GiB"))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("recovery", ["affine", "none"])
def test_the_plan_is_near_the_truth(recovery: str) -> None:
    """Of a run large enough that Python is not all of it."""
    row = measure(Setting("tinyllama-1.1b", layers=1, samples=8, preset="slimllm", recovery=recovery, on_disk=True))
    assert sum(row["memory_gib"].values()) == pytest.approx(row["peak_host_gib"], rel=0.15)


@pytest.mark.parametrize("form", ["configuration alone", "GGUF in float32"])
def test_the_forecast_is_the_plan_of_the_run(form: str, tmp_path: Path, stories: PreTrainedModel) -> None:
    model = STORIES
    (described := tmp_path / "described").mkdir()
    (described / "config.json").write_text((STORIES / "config.json").read_text())
    if form == "GGUF in float32":
        model = described = write_gguf(stories, tmp_path / "model.gguf")
    found = forecast(str(described), PruneConfig(0.3, "slimllm"))
    report = prune(model, tmp_path / "out", PruneConfig(0.3, "slimllm"))
    assert found.num_layers == 5 and found.params == report.parameters["before"] and found.seconds
    ours = {name: size / GIB for name, size in found.plan.host.items() if name != "runtime"}
    theirs = {name: size for name, size in report.memory_gib.items() if name != "runtime"}
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert found.plan.describe()["disk_gib"] == pytest.approx(report.plan["disk_gib"], rel=1e-5)


def test_plan_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = call(capsys, "plan", "llama-33b", "--preset", "slimllm", "--samples", "2048", "--host-memory", "9GiB")
    assert code == 0 and "60 layers, 32.53 billion parameters" in out and "hidden states are stored in files" in out
    code, _, err = call(capsys, "plan", "llama-33b", "--host-memory", "1GiB")
    assert code == 2 and "at least (in the phase" in " ".join(err.split())
    code, out, _ = call(capsys, "plan", "llama-33b", "--device", "cuda", "--gpu-memory", "7GiB", "--recovery", "lstsq")
    assert code == 0 and "GPU memory" in out and "the FFN's Gram is stored in host memory" in out
    code, out, _ = call(capsys, "plan", "llama-33b", "--device", "cuda", "--ranks", "4")
    assert code == 0 and "shared by 4 ranks" in out and "through the busiest rank: Grams" in out
    code, _, err = call(capsys, "plan", "llama-33b", "--ranks", "400")
    assert code == 2 and "ranks must be from 1 to the number of samples" in " ".join(err.split())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    code, _, err = call(capsys, "plan", tmp_path)
    assert code == 2 and "not supported" in err
