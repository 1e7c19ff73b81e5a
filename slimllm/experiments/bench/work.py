"""Work of a run: operations and bytes of its algorithm by stage, counted from the sizes, and the machine's rates."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from slimllm.methods.allocation.sensitivity import TOKENS, probed_layers
from slimllm.models.slicing import LayerSizes
from slimllm.ops.channels import computes_vectors
from slimllm.ops.dispatch import full_precision


@dataclass(frozen=True)
class Work:
    """Numbers of operations by precision, and bytes moved.

    A multiply-add counts as two operations; a symmetric result counts for only one of its halves. `operations` counts the
    forward passes and Grams, in the dtype of the computation; `single` counts operations that are always in fp32, and
    `precise` those in fp64.
    """

    operations: float = 0.0
    single: float = 0.0
    precise: float = 0.0
    num_bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, kind.name) + getattr(other, kind.name) for kind in dataclasses.fields(self)))


@dataclass(frozen=True)
class Rates:
    """Measured rates of the machine: operations per second in the dtype of the computation, fp32 and fp64, and bytes."""

    operations_per_s: float
    single_per_s: float
    precise_per_s: float
    bytes_per_s: float

    def floor_s(self, work: Work) -> float:
        """Return the least seconds for work at these rates: the time of its operations or bytes, whichever is longer."""
        computing = (
            work.operations / self.operations_per_s + work.single / self.single_per_s + work.precise / self.precise_per_s
        )
        return max(computing, work.num_bytes / self.bytes_per_s)


def stage_work(
    report: dict[str, Any], sizes: list[LayerSizes], hidden_size: int, head_dim: int, read_bytes: float, ranks: int = 1
) -> dict[str, Work]:
    """Count the work of every stage of a run, by the stage's name in `stages_s`.

    Args:
        report: The run's report (`PruneReport` as a dict).
        sizes: Sizes of the dense layers.
        hidden_size, head_dim: The model's sizes.
        read_bytes: Bytes that a parameter takes in the files that are read.
        ranks: Processes that share large solves; the windows of the report are those of one.
    """
    tokens, seq_len = report["calibration"]["tokens"], report["calibration"]["seq_len"]
    held_out = report["calibration"].get("held_out", 0) * seq_len
    measured = report["calibration"].get("dense_windows", report["calibration"]["samples"]) * seq_len
    config: dict[str, Any] = report["config"]
    on_gpu = str(report["device"]).startswith("cuda")
    by_stage: dict[str, Work] = defaultdict(Work)
    probed = probed_layers(len(sizes)) if config["by_sensitivity"] else []
    for index, (size, layer) in enumerate(zip(sizes, report["layers"])):
        found = _layer_work(
            size, layer, (tokens, measured, held_out), seq_len, hidden_size, head_dim, config, on_gpu, ranks
        )
        if probed:  # one window, and two damaged copies of it for each probed layer up to this one
            passing = (1 + 2 * sum(at <= index for at in probed)) * min(TOKENS, seq_len)
            found["sensitivity"] = Work(found["dense pass"].operations * passing / measured)
        found["read"] = Work(num_bytes=2 * read_bytes * layer["parameters_before"])
        for stage, work in found.items():
            by_stage[stage] += work
    return dict(by_stage)


def _layer_work(
    size: LayerSizes,
    layer: dict[str, Any],
    num_tokens: tuple[int, int, int],
    seq_len: int,
    hidden_size: int,
    head_dim: int,
    config: dict[str, Any],
    on_gpu: bool,
    ranks: int,
) -> dict[str, Work]:
    """Count the work of a layer; `num_tokens` are those of the pruning, of the dense pass, and those held out of both."""
    tokens, measured_tokens, held_out = num_tokens
    width, kv_width, channels = size.num_heads * head_dim, size.num_kv_heads * head_dim, size.intermediate_size
    kept_width, kept_channels = layer["num_heads"] * head_dim, layer["intermediate_size"]
    attention_pruned, ffn_pruned = kept_width < width, kept_channels < channels
    into_attention = 2 * tokens * hidden_size * (width + 2 * kv_width) + 2 * tokens * seq_len * width  # causal: half counts
    into_ffn = 2 * (1 + size.gated) * tokens * hidden_size * channels
    out = 2 * tokens * hidden_size
    dense: float = into_attention + into_ffn + out * (width + channels)
    forward: float = into_attention + into_ffn + out * (kept_width + kept_channels)
    pruned = into_attention * kept_width / width + into_ffn * kept_channels / channels + out * (kept_width + kept_channels)
    statistics, heads, selection, recover, allocation = Work(), Work(), Work(), Work(), Work()
    needs = config["method_needs"]
    lstsq, obs = "COLUMN_GRAM" in needs["recovery"], "COLUMN_GRAM" in needs["criterion"]
    by_output, measured = "OUTPUT_GRAM" in needs["criterion"] + needs["recovery"], "COLUMN_GRAM" in needs["allocation"]
    if measured:
        statistics += Work(measured_tokens * (width**2 + channels**2))
        allocation = _elimination(width, 0, hidden_size) + _elimination(channels, 0, hidden_size, ranks)
    if config.get("one_pass"):  # no Gram, and no window passes the pruned layers
        forward, attention_pruned, ffn_pruned = 0.0, False, False
    weighted = config.get("token_weights") == "norm"  # the weights need the dense output
    if attention_pruned:
        forward += out * width if weighted else 0.0
        units = size.units(config.get("head_unit", "kv-group"))[0]
        if layer.get("attention_statistics") == "heads":
            statistics += Work(single=tokens * hidden_size * (2 * width + units**2))
        else:
            statistics += Work(tokens * width**2)
            contributions = hidden_size * width**2 * (1 + 1 / units)
            heads += Work(single=contributions) if on_gpu else Work(precise=contributions)
        if obs:
            heads += _elimination(width, kept_width, hidden_size)
        if lstsq:
            recover += _regression(width, kept_width, hidden_size, ranks)
    if ffn_pruned:
        if by_output:
            # Eigenvectors of a symmetric matrix: tridiagonal reduction and transformation back. Or a matrix function: about
            # ten products, of which a CPU computes half, and a factor.
            axes = Work(single=((20 if on_gpu else 10) + 1 / 3) * hidden_size**3)
            published = config["method_settings"]["criterion"].get("keep_lowest", 0) > 0
            if computes_vectors(hidden_size, on_gpu) or (published and not on_gpu):
                axes = Work(precise=(4 / 3 + 2) * hidden_size**3)
            selection += axes + Work(single=2 * hidden_size**2 * channels)
        if obs or lstsq:
            statistics += Work(tokens * channels**2)
            if weighted:
                forward += out * channels
            else:
                selection += Work(single=hidden_size * channels * (2 * channels + hidden_size))  # the output's covariance
        if obs:
            selection += _elimination(channels, kept_channels, hidden_size, ranks)
        if lstsq:
            recover += _regression(channels, kept_channels, hidden_size, ranks)
        if not (obs or lstsq):
            statistics += Work(tokens * hidden_size**2 if by_output else 0.0)
            forward += out * channels  # y, in addition to ŷ
    return {
        "dense pass": Work(dense * measured_tokens / tokens),
        "perplexity": Work((dense + pruned) * held_out / tokens),
        "forward": Work(forward),
        "statistics": statistics,
        **({"allocation": allocation} if measured else {}),
        "heads": heads,
        "channels": selection,
        "recovery": recover,
        "write": Work(num_bytes=2 * layer["parameters_after"]),  # in half precision
    }


def _regression(features: int, kept: int, hidden_size: int, ranks: int) -> Work:
    """Count the regression of removed features' output on kept ones: cross moments, a factor, and two triangular solves."""
    removed = features - kept
    each = 2 * removed * hidden_size * (kept + removed) + kept**3 / 3 + 2 * kept**2 * hidden_size
    return Work(precise=each / ranks)


def _elimination(features: int, kept: int, hidden_size: int, ranks: int = 1) -> Work:
    """Count an inverse, and the updates of the inverse and of the weights for all removed features.

    A process alone updates half of the inverse, as it is symmetric; each of several has whole rows of it.
    """
    inverse, updates = (1, 1 / 3) if ranks == 1 else (5 / 3, 2 / 3)
    updated = updates * (features**3 - kept**3) + hidden_size * (features**2 - kept**2)
    return Work(single=(inverse * features**3 + updated) / ranks)


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure the rates of large products and of a copy on the device, as the best of several."""
    a = torch.randn((2048, 2048) if device.type == "cpu" else (8192, 8192), device=device)
    target = torch.empty_like(a)
    copying = _best_seconds(lambda: target.copy_(a), device)
    with full_precision(device):
        rates = {kind: _product_rate(a, kind, device) for kind in (dtype, torch.float32, torch.float64)}
    return Rates(rates[dtype], rates[torch.float32], rates[torch.float64], 2 * a.numel() * a.element_size() / copying)


def _product_rate(a: torch.Tensor, dtype: torch.dtype, device: torch.device) -> float:
    """Measure operations per second of square products; sizes double until one takes more than 0.1 s."""
    rate, size = 0.0, 512
    while size <= len(a):
        factor = a[:size, :size].to(dtype)
        seconds = _best_seconds(partial(torch.matmul, factor, factor), device)
        rate, size = max(rate, 2 * size**3 / seconds), 2 * size
        if seconds > 0.1:
            break
    return rate


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
