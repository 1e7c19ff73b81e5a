"""What a run has to do at least: operations and bytes by stage, counted from the sizes, and the machine's rates."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from slimllm.slicing import LayerSizes


@dataclass(frozen=True)
class Work:
    """Operations (a multiply-add is two; a symmetric result's half counts once) by kind, and bytes moved.

    `operations` are those of the forward passes and Grams, in the dtype of the computation; `precise` those in fp64.
    """

    operations: float = 0.0
    precise: float = 0.0
    num_bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.operations + other.operations, self.precise + other.precise, self.num_bytes + other.num_bytes
        )  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """What the machine does, measured: operations per second in the computation's dtype and in fp64, bytes per second."""

    operations_per_s: float
    precise_per_s: float
    bytes_per_s: float

    def floor_s(self, work: Work) -> float:
        """Seconds that a piece of work takes at least: its operations, or its bytes where those take longer."""
        computing = work.operations / self.operations_per_s + work.precise / self.precise_per_s
        return max(computing, work.num_bytes / self.bytes_per_s)


def stage_work(report: dict[str, Any], sizes: list[LayerSizes], hidden_size: int, head_dim: int) -> dict[str, Work]:
    """The work of every stage of a run, by the names in `stages_s`.

    Args:
        report: The run's report (`PruneReport` as a dict).
        sizes: Sizes of the dense layers.
        hidden_size, head_dim: Of the model.
    """
    tokens, seq_len = report["calibration"]["tokens"], report["calibration"]["seq_len"]
    recovery: str = report["config"]["recovery"]
    by_stage: dict[str, Work] = defaultdict(Work)
    for size, layer in zip(sizes, report["layers"]):
        found = _layer_work(size, layer, tokens, seq_len, hidden_size, head_dim, recovery)
        for stage, work in found.items():
            by_stage[stage] += work
    return dict(by_stage)


def _layer_work(
    size: LayerSizes, layer: dict[str, Any], tokens: int, seq_len: int, hidden_size: int, head_dim: int, recovery: str
) -> dict[str, Work]:
    width, kv_width, channels = size.num_heads * head_dim, size.num_kv_heads * head_dim, size.intermediate_size
    kept_width, kept_channels = layer["num_heads"] * head_dim, layer["intermediate_size"]
    attention_pruned, ffn_pruned = kept_width < width, kept_channels < channels
    into_attention = 2 * tokens * hidden_size * (width + 2 * kv_width) + 2 * tokens * seq_len * width  # causal: half of it
    into_ffn = 4 * tokens * hidden_size * channels
    out = 2 * tokens * hidden_size
    forward = into_attention + into_ffn + out * (kept_width + kept_channels)
    statistics, heads, selection, recover = Work(), Work(), Work(), Work()
    if attention_pruned:
        units = size.num_kv_heads
        statistics += Work(tokens * width**2)
        heads += Work(precise=hidden_size * width**2 * (1 + 1 / units))
        if recovery == "lstsq":
            recover += _regression(width, kept_width, hidden_size)
    if ffn_pruned:
        # Of a symmetric matrix and all its eigenvectors: reduction to three diagonals, and back.
        selection += Work(2 * hidden_size**2 * channels, precise=(4 / 3 + 2) * hidden_size**3)
        if recovery == "lstsq":
            statistics += Work(tokens * channels**2)
            selection += Work(2 * hidden_size * channels * (channels + hidden_size))
            recover += _regression(channels, kept_channels, hidden_size)
        else:
            statistics += Work(tokens * hidden_size**2)
            forward += out * (channels - kept_channels)  # of y and ŷ one follows from the other
    stored = 2  # bytes a parameter, in half precision
    return {
        "read": Work(num_bytes=2 * stored * layer["parameters_before"]),
        "dense pass": Work(into_attention + into_ffn + out * (width + channels)),
        "forward": Work(forward),
        "statistics": statistics,
        "heads": heads,
        "channels": selection,
        "recovery": recover,
        "write": Work(num_bytes=stored * layer["parameters_after"]),
    }


def _regression(features: int, kept: int, hidden_size: int) -> Work:
    """Of the removed features' output on the kept ones: the cross moments, the factor, and two triangular solves."""
    removed = features - kept
    return Work(precise=2 * removed * hidden_size * (kept + removed) + kept**3 / 3 + 2 * kept**2 * hidden_size)


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Rates of large products and of a copy on the device, the best of several."""
    size = 2048 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device)
    half, precise = a.to(dtype), a[:2048, :2048].double()
    target = torch.empty_like(a)
    seconds = [
        _best_seconds(function, device)
        for function in (lambda: half @ half, lambda: precise @ precise, lambda: target.copy_(a))
    ]
    return Rates(2 * size**3 / seconds[0], 2 * 2048**3 / seconds[1], 2 * a.numel() * a.element_size() / seconds[2])


def _best_seconds(function: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    best = float("inf")
    for _ in range(rounds + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
