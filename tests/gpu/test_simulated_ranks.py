"""Two processes with the simulated GPU: their sums stay on the device, contiguous, as NCCL wants them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import STORIES

import slimllm
from slimllm import PruneConfig

simulated: Any = sys.modules.get("simulated_cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(simulated is None, reason="for the simulated device (make test-simulated-gpu)"),
]
CODE = """
import json, sys
import slimllm, simulated_cuda
from torch import distributed
rank, folder, model, settings = int(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
slimllm.prune(model, f"{folder}/two", slimllm.PruneConfig(**settings), group=distributed.group.WORLD)
print(json.dumps(dict(simulated_cuda.GPU.collectives)))
distributed.barrier()
"""


@pytest.mark.parametrize("preset", ["slimllm", pytest.param("best", marks=pytest.mark.slow)])
def test_sums_stay_on_the_device(preset: str, tmp_path: Path) -> None:
    settings = {"ratio": 0.3, "preset": preset, "samples": 4, "seq_len": 32, "device": "cuda", "compute_dtype": "float32"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, str(rank), str(tmp_path), str(STORIES), json.dumps(settings)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "SLIMLLM_BACKEND": "torch"},
        )
        for rank in range(2)
    ]
    found = [json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    for one in found:
        assert one["allreduce_ cuda"] > 10 and one["allreduce_ cpu"] <= 3  # of the losses, which are one number
        assert one["broadcast_ cpu"] > 10  # what ranks tell each other
    two = slimllm.PruneReport.read(tmp_path / "two")
    one = slimllm.prune(STORIES, tmp_path / "one", PruneConfig(**settings))
    for layer, other in zip(one.layers, two.layers):
        assert layer["kept_heads"] == other["kept_heads"] and layer["kept_channels"] == other["kept_channels"]
