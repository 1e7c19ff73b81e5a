"""Plan of a run: how it fits its memory budgets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimllm.checks import GIB, parse_bytes
from slimllm.config import PruneConfig
from slimllm.errors import InputError
from slimllm.methods.statistics import Needs
from slimllm.pruning.memory_estimate import Parts, Sizes, measures_gram, phases, probe_bytes
from slimllm.runtime.hidden_states import Placement

# Memory that is freed but stays with the allocator, and parts too small to count: a constant, and a fraction.
_SLACK_BYTES, _SLACK = GIB / 10, 0.05
ROUNDINGS = ("keep_inner_bytes", "gram", "systems")  # fields of a placement on which the last digits of a result depend
GPU_RUNTIME = GIB / 2  # the CUDA context, and what libraries reserve


@dataclass(frozen=True)
class Plan:
    """Plan of a run, and its memory estimate.

    Attributes:
        config: The settings.
        placement: Where token-sized tensors are stored.
        gpu, host: Parts of the two peaks, in bytes; `runtime` is the memory of Python and the libraries.
        gpu_phase, host_phase: Names of the phases with these peaks.
        disk: The most bytes on the disk, part by part, including the result.
        choices: The measures taken to fit the budgets, in words.
    """

    config: PruneConfig
    placement: Placement
    gpu: Parts
    host: Parts
    gpu_phase: str
    host_phase: str
    disk: Parts
    choices: list[str]

    @property
    def peak_gpu(self) -> float:
        """The most bytes of GPU memory."""
        return sum(self.gpu.values())

    @property
    def peak_host(self) -> float:
        """The most bytes of host memory."""
        return sum(self.host.values())

    def describe(self) -> dict[str, Any]:
        """Return what was chosen, for the report."""
        return {
            "states": self.placement.states,
            "gram": self.placement.gram,
            "systems": self.placement.systems,
            "keep_inner_bytes": self.placement.keep_inner_bytes,
            "batch_size": self.config.batch_size,
            "host_phase": self.host_phase,
            "gpu_phase": self.gpu_phase if self.gpu else None,
            "disk_gib": {name: size / GIB for name, size in self.disk.items()},
            "choices": self.choices,
        }


def make_plan(
    sizes: Sizes,
    config: PruneConfig,
    runtime: float,
    gpu_runtime: float = 0.0,
    folder: Path | None = None,
    begun: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan a run within the budgets of the settings, with as little lost time as possible.

    Args:
        sizes: Sizes of the model and its calibration.
        config: The settings.
        runtime, gpu_runtime: Bytes that Python and the libraries take on the host and on a GPU.
        folder: Where files of hidden states are made, if any.
        begun: The values of `ROUNDINGS` with which the resumed run began; None: they are chosen to fit.

    Raises:
        ValueError: (as InputError) the run does not fit the budgets; the message says which budget it needs.
    """
    budgets = {
        "host_memory": parse_bytes("host_memory", config.host_memory),
        "gpu_memory": parse_bytes("gpu_memory", config.gpu_memory) if sizes.on_gpu else math.inf,
    }
    if config.gpu_memory is not None and not sizes.on_gpu:
        raise InputError("gpu_memory is a budget for a GPU, but the device is a CPU; leave it out, or give --device cuda.")
    steps = [step for step in _STEPS if step.applies(sizes, config)]
    start = Placement(folder=folder, read_ahead=sizes.on_gpu)
    if begun:
        known = {name: begun[name] for name in ROUNDINGS if name in begun}  # a run that an older version began lacks some
        start = dataclasses.replace(start, **known)
        steps = [step for step in steps if step.field not in ROUNDINGS]

    def planned(taken: list[_Step]) -> Plan:
        placement = dataclasses.replace(start, **{step.field: step.value for step in taken})
        every = list(phases(sizes, config, placement))
        gpu = max(every, key=lambda phase: sum(phase.gpu.values()))
        host = max(every, key=lambda phase: sum(phase.host.values()))
        return Plan(
            config=config,
            placement=placement,
            gpu=_account(gpu.gpu, gpu_runtime) if sizes.on_gpu else {},
            host=_account(host.host, runtime),
            gpu_phase=gpu.name,
            host_phase=host.name,
            disk=_disk(sizes, config, placement),
            choices=[step.words for step in taken],
        )

    def fits(plan: Plan) -> bool:
        return plan.peak_host <= budgets["host_memory"] and plan.peak_gpu <= budgets["gpu_memory"]

    taken: list[_Step] = []
    for step in steps:
        now, then = planned(taken), planned([*taken, step])
        if fits(now):
            break
        worse_host = now.peak_host > budgets["host_memory"] and then.peak_host > now.peak_host
        worse_gpu = now.peak_gpu > budgets["gpu_memory"] and then.peak_gpu > now.peak_gpu
        if not (worse_host or worse_gpu):
            taken.append(step)
    plan = planned(taken)
    if not fits(plan):
        which = "host_memory" if plan.peak_host > budgets["host_memory"] else "gpu_memory"
        peak, phase = (plan.peak_host, plan.host_phase) if which == "host_memory" else (plan.peak_gpu, plan.gpu_phase)
        least = math.ceil(peak / GIB * 100) / 100
        advice = ", or take the preset slimllm" * (Needs.COLUMN_GRAM in config.needs and sizes.experts == 1)
        raise InputError(
            f"{which} is {getattr(config, which)}, but this run takes {least:.2f} GiB at least (in the phase {phase!r}); "
            f"give {least:.2f}GiB or more{advice}."
        )
    for step in taken[:-1]:  # later steps may have made earlier ones unnecessary
        without = [other for other in taken if other is not step]
        if fits(planned(without)):
            taken = without
    return planned(taken)


@dataclass(frozen=True)
class _Step:
    """A measure that saves memory: its description, and the field of the placement and the value that it sets."""

    words: str
    field: str
    value: Any
    gpu_only: bool = False

    def applies(self, sizes: Sizes, config: PruneConfig) -> bool:
        has_gram = Needs.COLUMN_GRAM in config.needs or measures_gram(config) or sizes.experts > 1
        needed = self.field not in ("gram", "systems") or has_gram
        return needed and (sizes.on_gpu or not self.gpu_only)


# In the order of the time that they cost, least first.
_STEPS = [
    _Step("weights are not read ahead", "read_ahead", False, gpu_only=True),
    _Step("hidden states are stored in host memory", "states", "host", gpu_only=True),
    _Step("inner activations are computed twice instead of kept", "keep_inner_bytes", 0),
    _Step("the FFN's Gram is stored in host memory", "gram", "host", gpu_only=True),
    _Step("the systems of the FFN's Gram are solved on the host", "systems", "host", gpu_only=True),
    _Step("hidden states are stored in files", "states", "disk"),
    _Step("the FFN's Gram is stored in a file", "gram", "disk"),
]


def _account(parts: Parts, runtime: float) -> Parts:
    alive = {name: size for name, size in parts.items() if size}
    return {"runtime": runtime, **alive, "slack": _SLACK_BYTES + _SLACK * sum(alive.values())}


def _disk(sizes: Sizes, config: PruneConfig, placement: Placement) -> Parts:
    """Estimate disk space: the result (at most the model's size), two states of the journal, files of hidden states."""
    window = sizes.seq_len * sizes.hidden_size * sizes.computed
    states, held_out = sizes.samples * window, sizes.held_out * window
    return {
        "result, at most": sizes.params * sizes.written,
        "model.gguf": sizes.params * sizes.written if config.program == "llama.cpp" else 0,
        "journal": 2 * held_out + 2 * (states + (probe_bytes(sizes) if config.allocation.by_sensitivity else 0)),
        "files of hidden states": 2 * states + held_out if placement.states == "disk" else 0,  # lstsq has no outputs there
        "file of the Gram": sizes.ranks * 4 * sizes.experts * sizes.intermediate_size**2 if placement.gram == "disk" else 0,
    }
