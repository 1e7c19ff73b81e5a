"""What a run will take, counted from the sizes alone, and how to make it fit a budget.

A phase is a moment of the run with what is alive in it, part by part, in bytes; the peak is the phase that has most.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from slimllm.config import GIB, PruneConfig, parse_bytes
from slimllm.errors import InputError
from slimllm.slicing import LayerSizes
from slimllm.states import Placement

Parts = dict[str, float]
_TOKENS_PER_BATCH = 1024
# What is freed but stays with the allocator, and what is too small to be a part: some, and a fraction.
_SLACK_BYTES, _SLACK = GIB / 10, 0.03
GPU_RUNTIME = GIB / 2  # the CUDA context, and what libraries set aside


@dataclass(frozen=True)
class Sizes:
    """What memory depends on.

    Attributes:
        hidden_size, vocab_size: D and V.
        attention_width, kv_width: Inputs of o_proj and outputs of k_proj, the most of any layer.
        units: What heads are pruned in, KV groups or heads, the most of any layer.
        intermediate_size: I, the most of any layer.
        layer_params, params: Parameters of the largest layer and of the whole model.
        stored, computed, written: Bytes of a number as it is read, as it computes, and as it is written.
        samples, seq_len: Calibration windows, and tokens of each.
        on_gpu: Whether the device has a memory of its own.
    """

    hidden_size: int
    vocab_size: int
    attention_width: int
    kv_width: int
    units: int
    intermediate_size: int
    layer_params: int
    params: int
    stored: int
    computed: int
    written: int
    samples: int
    seq_len: int
    on_gpu: bool


def sizes_of(
    config: PretrainedConfig, layers: list[LayerSizes], head_dim: int, params: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], windows: tuple[int, int], device: torch.device,
) -> Sizes:  # fmt: skip
    """The sizes of a model, of its numbers (read, computed and written), and of its windows (samples, seq_len)."""
    return Sizes(
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        attention_width=max(size.num_heads for size in layers) * head_dim,
        kv_width=max(size.num_kv_heads for size in layers) * head_dim,
        units=max(size.num_kv_heads for size in layers),
        intermediate_size=max(size.intermediate_size for size in layers),
        layer_params=max(size.params for size in layers),
        params=params,
        stored=dtypes[0].itemsize,
        computed=dtypes[1].itemsize,
        written=dtypes[2].itemsize,
        samples=windows[0],
        seq_len=windows[1],
        on_gpu=device.type == "cuda",
    )


def batch_windows(samples: int, seq_len: int, batch_size: int | None) -> int:
    """How many windows go through a layer together: as many as asked for, or about 1024 tokens."""
    return min(samples, batch_size or max(1, _TOKENS_PER_BATCH // seq_len))


@dataclass(frozen=True)
class Phase:
    """What is alive at a moment of the run, in bytes: in the memory of a GPU, and in that of the host."""

    name: str
    gpu: Parts
    host: Parts


def phases(sizes: Sizes, config: PruneConfig, placement: Placement) -> Iterator[Phase]:
    """The moments of a run that can be its peak, without what Python and the libraries take.

    Args:
        sizes: Of the model and its calibration.
        config: The settings.
        placement: Where what is as large as all tokens lives.
    """
    d, i, a, s, c = sizes.hidden_size, sizes.intermediate_size, sizes.attention_width, sizes.stored, sizes.computed
    kept = math.ceil((1 - config.ratio) * i)
    tokens = sizes.samples * sizes.seq_len
    batch = batch_windows(sizes.samples, sizes.seq_len, config.batch_size) * sizes.seq_len
    function = (config.feature_space or ("function" if sizes.on_gpu else "eigh")) == "function"
    lstsq = config.recovery == "lstsq"
    streams = 1 if lstsq else 2  # of what is as large as all tokens, in the FFN: beside the residual stream, its outputs

    def at(name: str, num_streams: int, device: Mapping[str, float], host: Mapping[str, float] | None = None) -> Phase:
        shared = not sizes.on_gpu and s == c  # the layer computes with the tensors that were read
        device = {"layer, computing": 0 if shared else sizes.layer_params * c, **device}
        host = {"layer, as stored": sizes.layer_params * s, **(host or {})}
        states = {"hidden states": num_streams * tokens * d * c}
        if placement.states == "device":
            device |= states
        elif placement.states == "host":
            host |= states
        return Phase(name, device, host) if sizes.on_gpu else Phase(name, {}, {**host, **device})

    def inner(width: int) -> Parts:
        num_bytes = tokens * width * c
        return {"inner activations": num_bytes if num_bytes <= placement.keep_inner_bytes else 0}

    yield at("read", 1, {}, {"mapped file": d * i * s})
    yield at("dense pass", 1, {"batch": batch * (4 * i + 4 * d) * c})
    yield at("attention", 1, inner(a) | {"batch": batch * (3 * a + 2 * sizes.kv_width + 3 * d) * c, "Gram": a**2 * 4})
    heads = inner(a) | {"Gram": a**2 * (4 + 8), "heads' covariances": 2 * sizes.units**2 * d * 8}
    yield at("heads", 1, heads)
    ffn_gram = {"Gram": (i if lstsq else d) ** 2 * 4}
    yield at("FFN", streams, inner(i) | ffn_gram | {"batch": batch * (4 * i + 4 * d) * c})
    # A covariance in fp64, and either its eigenvectors and LAPACK's workspace, or six matrices of the function in fp32.
    space = d**2 * (8 + (6 * 4 if function else 3 * 8)) + (0 if c == 4 else d * i * 4)
    yield at("channels", streams, inner(i) | ffn_gram | {"feature space": space})
    sliced = {"pruned layer": 3 * kept * d * s + 4 * kept * d}
    if lstsq:
        across = {"moments": 4.5 * 8 * kept * d + 8 * (i - kept) * d}
        system = {"system": 2 * 8 * kept**2}  # and its factor
        yield at("recovery", streams, inner(i) | ffn_gram | system | across)
        yield at("slicing", streams, inner(i) | ffn_gram | {"solution": 2 * 8 * kept * d}, sliced)
    else:
        yield at("slicing", streams, inner(i) | {"covariance": d**2 * (4 + 8)}, sliced)
    embedded = 0 if placement.states == "disk" or sizes.on_gpu else tokens * d * c
    yield Phase("embeddings", {}, {"embeddings": sizes.vocab_size * d * s * 2, "hidden states": embedded})


@dataclass(frozen=True)
class Plan:
    """How a run is done, and what it takes.

    Attributes:
        config: The settings, with what was chosen.
        placement: Where what is as large as all tokens lives.
        gpu, host: The parts of the two peaks, in bytes; `runtime` is what Python and the libraries take.
        gpu_phase, host_phase: When those peaks are.
        disk: Bytes on the disk at most, the result among them.
        choices: What was done to fit the budgets, in words.
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
        """Bytes of a GPU's memory at most."""
        return sum(self.gpu.values())

    @property
    def peak_host(self) -> float:
        """Bytes of the host's memory at most."""
        return sum(self.host.values())

    def describe(self) -> dict[str, Any]:
        """What was chosen, for the report."""
        return {
            "states": self.placement.states,
            "keep_inner_bytes": self.placement.keep_inner_bytes,
            "batch_size": self.config.batch_size,
            "feature_space": self.config.feature_space,
            "host_phase": self.host_phase,
            "gpu_phase": self.gpu_phase if self.gpu else None,
            "disk_gib": {name: size / GIB for name, size in self.disk.items()},
            "choices": self.choices,
        }


def make_plan(
    sizes: Sizes, config: PruneConfig, runtime: float, gpu_runtime: float = 0.0, folder: Path | None = None
) -> Plan:
    """How to prune within the budgets of the settings, with as little lost time as possible.

    Args:
        sizes: Of the model and its calibration.
        config: The settings; what they leave open is chosen.
        runtime: Bytes that Python and the libraries take on the host, `gpu_runtime` on a GPU.
        folder: Where files of hidden states are made, if they are.

    Raises:
        ValueError: (as InputError) it cannot be done within the budgets; says with which it can.
    """
    budgets = {
        "host_memory": parse_bytes("host_memory", config.host_memory),
        "gpu_memory": parse_bytes("gpu_memory", config.gpu_memory) if sizes.on_gpu else math.inf,
    }
    steps = [step for step in _STEPS if step.applies(sizes, config)]

    def planned(taken: list[_Step]) -> Plan:
        changed, placement = config, Placement(folder=folder)
        for step in taken:
            changed, placement = step.take(changed, placement)
        every = list(phases(sizes, changed, placement))
        gpu = max(every, key=lambda phase: sum(phase.gpu.values()))
        host = max(every, key=lambda phase: sum(phase.host.values()))
        return Plan(
            config=changed,
            placement=placement,
            gpu=_account(gpu.gpu, gpu_runtime) if sizes.on_gpu else {},
            host=_account(host.host, runtime),
            gpu_phase=gpu.name,
            host_phase=host.name,
            disk=_disk(sizes, placement),
            choices=[step.words for step in taken],
        )

    def fits(plan: Plan) -> bool:
        return plan.peak_host <= budgets["host_memory"] and plan.peak_gpu <= budgets["gpu_memory"]

    taken: list[_Step] = []
    for step in steps:
        if fits(planned(taken)):
            break
        taken.append(step)
    plan = planned(taken)
    if not fits(plan):
        which = "host_memory" if plan.peak_host > budgets["host_memory"] else "gpu_memory"
        peak, phase = (plan.peak_host, plan.host_phase) if which == "host_memory" else (plan.peak_gpu, plan.gpu_phase)
        least = math.ceil(peak / GIB * 100) / 100
        raise InputError(
            f"{which} is {getattr(config, which)}, but this run takes {least:.2f} GiB at least (in the phase {phase!r}); "
            f"give {least:.2f}GiB or more, or fewer samples."
        )
    for step in taken[:-1]:  # the last ones may have made the first ones needless
        without = [other for other in taken if other is not step]
        if fits(planned(without)):
            taken = without
    return planned(taken)


@dataclass(frozen=True)
class _Step:
    """One way to need less: the field it sets and its value, and what it means."""

    words: str
    field: str
    value: Any
    gpu_only: bool = False

    def applies(self, sizes: Sizes, config: PruneConfig) -> bool:
        return getattr(config, self.field, None) is None and (sizes.on_gpu or not self.gpu_only)

    def take(self, config: PruneConfig, placement: Placement) -> tuple[PruneConfig, Placement]:
        change: dict[str, Any] = {self.field: self.value}
        if hasattr(placement, self.field):
            return config, dataclasses.replace(placement, **change)
        return dataclasses.replace(config, **change), placement


# From what costs least time to what costs most.
_STEPS = [
    _Step("channels are weighed without eigenvectors", "feature_space", "function"),
    _Step("one window goes through a layer at a time", "batch_size", 1),
    _Step("hidden states live in host memory", "states", "host", gpu_only=True),
    _Step("inner activations are made twice instead of kept", "keep_inner_bytes", 0),
    _Step("hidden states live in files", "states", "disk"),
]


def _account(parts: Parts, runtime: float) -> Parts:
    alive = {name: size for name, size in parts.items() if size}
    return {"runtime": runtime, **alive, "slack": _SLACK_BYTES + _SLACK * sum(alive.values())}


def _disk(sizes: Sizes, placement: Placement) -> Parts:
    """The result, which may be as large as the model, two states of the journal, and the files of hidden states."""
    states = sizes.samples * sizes.seq_len * sizes.hidden_size * sizes.computed
    return {
        "result": sizes.params * sizes.written,
        "journal": 2 * states,
        "files of hidden states": 2 * states if placement.states == "disk" else 0,
    }
