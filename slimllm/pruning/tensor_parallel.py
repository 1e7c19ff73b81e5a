"""Numbers of devices over which tensor parallelism can split a model, from the sizes of its layers."""

from __future__ import annotations

import math
from collections.abc import Iterable

from slimllm.pruning.report import PruneReport

Layer = tuple[int, int, int]  # query heads, KV heads and FFN channels


def tensor_parallel_sizes(layers: Iterable[Layer]) -> list[int]:
    """Return the numbers of devices, from 2 on, over which every layer can be split as vLLM does it.

    A size divides every layer's query heads and FFN channels. It also divides the KV heads, or is a multiple of them; in
    that case several devices hold each KV head, as in vLLM's own implementations.

    Args:
        layers: Query heads, KV heads and FFN channels of every layer.
    """
    found = list(layers)
    common = math.gcd(*(size for heads, _, channels in found for size in (heads, channels)))
    kv_heads = {kv for _, kv, _ in found}
    return [
        size
        for size in range(2, common + 1)
        if common % size == 0 and all(kv % size == 0 or size % kv == 0 for kv in kv_heads)
    ]


def tensor_parallel_line(sizes: list[int]) -> str:
    """Format the sizes in words: `tensor parallel: 2, 4`."""
    return f"tensor parallel: {', '.join(map(str, sizes)) or 'one device only'}"


def tensor_parallel_of(report: PruneReport) -> str:
    """Format the line for a pruned model, with advice if the model could be split before pruning but cannot be now."""
    line = tensor_parallel_line(report.tensor_parallel)
    size = None if report.tensor_parallel else _lost_size(report)
    return line if size is None else f"{line}; prune with --heads-multiple-of {size} to allow {size}"


def _lost_size(report: PruneReport) -> int | None:
    """Return the least size over which the model could be split if its heads were kept in multiples of it, or None."""
    config = report.config
    if config["preset"] == "paper":
        return None
    before = [
        (layer["num_heads_before"], layer["num_kv_heads_before"], layer["intermediate_size_before"])
        for layer in report.layers
    ]
    whole_groups = config.get("head_unit") == "kv-group"
    for size in tensor_parallel_sizes(before):
        refused = whole_groups and any(kv_heads % size for _, kv_heads, _ in before)
        of_no_use = config.get("heads_multiple_of", 1) % size == 0 or (config.get("round_to") or size) % size
        if not (refused or of_no_use):
            return size
    return None
