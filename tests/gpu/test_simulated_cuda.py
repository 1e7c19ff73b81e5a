"""The simulated device itself, and what a run does on it."""

from __future__ import annotations

import copy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call
from conftest import STORIES, random_llama

import slimllm
from slimllm import PruneConfig, ops
from slimllm.ops.registry import forced
from slimllm.runtime.hidden_states import Placement

simulated: Any = sys.modules.get("simulated_cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(simulated is None, reason="for the simulated device (make test-simulated-gpu)"),
]


MOST_WAITS = {"slimllm": 55, "best": 90}  # for each layer
KINDS = ("pinned", "pageable")
MOST_WAITS_OF_BATCH = 8  # for each batch of a run, not for each layer


def test_devices_do_not_mix() -> None:
    here, there = torch.ones(3, 3), torch.ones(3, 3, device="cuda")
    for mixed in (lambda: here + there, lambda: there @ here, lambda: torch.cat([here, there])):
        with pytest.raises(simulated.DeviceError, match="same device"):
            mixed()
    assert float((there * 2.0).sum()) == 18 and float((there + torch.tensor(1.0)).sum()) == 18  # numbers may be anywhere
    assert torch.equal(there.cpu(), here)
    with pytest.raises(ValueError, match="must be on one device"):
        ops.token_cosine(here, there)


def test_fresh_memory_is_not_zero() -> None:
    assert bool(torch.empty(4, device="cuda").isnan().all()) and bool(
        torch.ones(2, device="cuda").new_empty(3).isnan().all()
    )
    assert not bool(torch.zeros(4, device="cuda").any())


def test_memory_in_flight_is_watched() -> None:
    host = torch.ones(100).pin_memory()
    there = host.to("cuda", non_blocking=True)
    with pytest.raises(simulated.RaceError, match="overwrites pinned memory"):
        host.zero_()
    torch.cuda.synchronize()
    host.zero_()
    back = torch.empty(100).pin_memory()
    back.copy_(there, non_blocking=True)
    with pytest.raises(simulated.RaceError, match="still writing"):
        back.sum()
    torch.cuda.synchronize()
    assert float(back.sum()) == 100


def test_memory_and_waits_are_counted() -> None:
    gpu = simulated.GPU
    gpu.reset()
    before = gpu.now
    large = torch.zeros(1000, 1000, device="cuda")
    view = large[10:]
    assert gpu.now - before == -(-large.nbytes // 512) * 512  # a view takes none
    del large, view
    assert gpu.now == before and gpu.peak - before >= 4_000_000
    assert not gpu.waits
    bool(torch.ones(3, device="cuda").any())
    assert sum(gpu.waits.values()) == 1


def test_a_kernel_wants_its_device_to_be_the_current_one() -> None:
    from slimllm.kernels.cosine import cosine_kernel

    a, result = torch.ones(4, 16, device="cuda"), torch.empty(4, device="cuda")
    with pytest.raises(simulated.DeviceError, match=r"outside of torch\.cuda\.device"):
        cosine_kernel[(1,)](a, a, result, 4, 16, 16, 1, 16, 1, BLOCK_N=4, BLOCK_F=16)


@pytest.mark.parametrize("preset", ["slimllm", pytest.param("best", marks=pytest.mark.slow)])
def test_waits_of_a_run(preset: str, stories: Any, token_ids: torch.Tensor) -> None:
    """The host waits for the device a limited number of times in a layer, however many batches pass it."""
    waits = {}
    for batch_size in (4, 1):
        model = copy.deepcopy(stories).to("cuda")
        simulated.GPU.reset()
        slimllm.prune_model(model, token_ids[:4, :32], PruneConfig(0.3, preset=preset, batch_size=batch_size))
        waits[batch_size] = sum(simulated.GPU.waits.values())
    assert waits[4] <= 5 * MOST_WAITS[preset], dict(simulated.GPU.waits)
    # The arguments of the layers are computed anew for every batch, once.
    assert waits[1] - waits[4] <= 3 * MOST_WAITS_OF_BATCH, dict(simulated.GPU.waits)


@pytest.mark.parametrize(
    "choice",
    [
        {"preset": "slimllm"},
        {"preset": "paper"},
        {"preset": "slimllm", "recovery": "lstsq"},
        {"preset": "slimllm", "criterion": "flap", "allocation": "flap", "recovery": "bias"},
        {"preset": "best"},
        {"preset": "best", "gram": "host"},
        {"preset": "slimllm", "recovery": "lstsq", "gram": "host"},
    ],
)
def test_peak_of_a_run(
    choice: dict[str, str], token_ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what the plan says, without what it reserves for libraries and for fragmentation."""
    choice = dict(choice)
    if gram := choice.pop("gram", ""):
        monkeypatch.setattr("slimllm.pruning.plan.Placement", lambda **rest: Placement(**{**rest, "gram": gram}))
    model = random_llama(hidden_size=256, intermediate_size=704, head_dim=64, num_attention_heads=4, num_key_value_heads=4)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    for file in STORIES.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "model")
    simulated.GPU.reset()
    config = PruneConfig(0.4, calibration=token_ids[:8] % 128, device="cuda", **choice)
    with forced("torch"):  # interpreted kernels are slow, and take no memory but their results
        report = slimllm.prune(tmp_path / "model", tmp_path / "out", config)
    plan = sum(size for name, size in report.gpu_memory_gib.items() if name not in ("runtime", "slack"))
    assert report.peak_gpu_gib <= 1.06 * plan + 0.5 / 1024
    assert report.peak_gpu_gib >= 0.45 * plan  # the least pruned layer of a run with a recovery by least squares varies


def test_memory_runs_out(stories_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another process took what was free when the run began."""
    simulated.GPU.limit = simulated.GPU.now + 200_000
    try:
        code, _, err = call(capsys, "prune", stories_path, "--ratio", "0.3", "--samples", "4", "--out", tmp_path / "out")
    finally:
        simulated.GPU.limit = torch.cuda.get_device_properties(0).total_memory
    assert code == 2 and "There is not enough GPU memory" in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_pinned_memory_runs_out(stories_path: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    """Pageable memory gives the same result."""

    def refusing(*_: Any) -> None:
        raise RuntimeError("CUDA error: out of memory")

    for name in KINDS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("slimllm.pruning.plan.Placement", lambda **_: Placement(states="host", read_ahead=True))
            if name == "pageable":
                patch.setattr(simulated.GPU, "pin", refusing)
            with forced("torch"):
                slimllm.prune(
                    stories_path, tmp_path / name, PruneConfig(0.3, "slimllm", calibration=token_ids[:4], device="cuda")
                )
    shards = {name: [path.read_bytes() for path in sorted((tmp_path / name).glob("*.safetensors"))] for name in KINDS}
    assert shards["pinned"] and shards["pinned"] == shards["pageable"]
