"""The simulated device itself, and what a run does on it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import slimllm
from slimllm import PruneConfig, ops

simulated: Any = sys.modules.get("simulated_cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(simulated is None, reason="for the simulated device (make test-simulated-gpu)"),
]


MOST_WAITS = {"default": 75, "best": 100}  # for each layer, with reading and writing its tensors


def test_devices_do_not_mix() -> None:
    here, there = torch.ones(3, 3), torch.ones(3, 3, device="cuda")
    for call in (lambda: here + there, lambda: there @ here, lambda: torch.cat([here, there])):
        with pytest.raises(simulated.DeviceError, match="same device"):
            call()
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


@pytest.mark.parametrize("preset", ["default", pytest.param("best", marks=pytest.mark.slow)])
def test_memory_and_waits_of_a_run(preset: str, stories_path: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    """The peak is within the plan's, and the host waits for the device a limited number of times in every layer."""
    gpu = simulated.GPU
    gpu.reset()
    config = PruneConfig(ratio=0.3, preset=preset, calibration=token_ids, device="cuda", compute_dtype="float32")
    report = slimllm.prune(stories_path, tmp_path / "out", config)
    assert 0 < report.peak_gpu_gib <= sum(report.gpu_memory_gib.values())
    waits = sum(gpu.waits.values()) - gpu.waits["synchronize"]  # without those of the stopwatch
    assert waits <= 5 * MOST_WAITS[preset], dict(gpu.waits)
