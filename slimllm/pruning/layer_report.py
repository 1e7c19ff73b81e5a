"""The entry of a layer in report.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

import torch

from slimllm.checkpoints.foreign_json import POSITIVE, Shape
from slimllm.models.slicing import LayerSizes
from slimllm.pruning.sublayer import PrunedSublayer

# Required shape of an entry when it is read.
LAYER_SHAPE: Shape = {
    "index": int,
    "ratio": float,
    "similarity": float,
    "parameters_before": POSITIVE,
    "parameters_after": int,
    "num_heads": int,
    "num_kv_heads": int,
    "intermediate_size": int,
    "num_heads_before?": int,
    "num_kv_heads_before?": int,
    "intermediate_size_before?": int,
    "kept_heads": [int],
    "kept_kv_heads": [int],
    "kept_channels?": [int],
    "expert_tokens?": [int],
    "head_importance?": [float],
    "channel_importance?": [float],
    "attention_statistics?": str,
    "attention_error_before?": float,
    "attention_error_after?": float,
    "ffn_error_before?": float,
    "ffn_error_after?": float,
}


class _Always(TypedDict):
    index: int
    ratio: float
    num_heads_before: int
    num_kv_heads_before: int
    intermediate_size_before: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    kept_heads: list[int]
    kept_kv_heads: list[int]
    parameters_before: int
    parameters_after: int
    similarity: float
    elapsed_s: float
    peak_host_gib: float


class LayerReport(_Always, total=False):
    """One layer's entry in report.json.

    Attributes:
        index: The layer's number.
        ratio: Fraction of its parameters that the allocation asked it to lose.
        num_heads, num_kv_heads, intermediate_size: Its sizes after pruning; with `_before`, those of the dense layer.
        kept_heads, kept_kv_heads: Sorted indices.
        kept_channels: The same; missing in a mixture of experts that was pruned, each of which keeps its own.
        expert_tokens: Number of calibration tokens that were routed to each expert of a mixture, if it was pruned.
        head_importance, channel_importance: The criterion's score of every unit, if such units were removed.
        attention_statistics: How attention's statistics were streamed, `gram`, `heads` or `dense` (in the dense pass), if
            heads were removed.
        attention_error_before, attention_error_after, ffn_error_before, ffn_error_after: The output's error relative to its
            variance, without and with the recovery, if something was removed; missing with statistics of the dense model.
            Of a mixture of experts, the experts' mean, weighted by their variances.
        parameters_before, parameters_after: Number of the layer's parameters.
        similarity: c, the mean cosine over tokens of the dense layer's input with its output.
        elapsed_s: Seconds, from reading it to writing it.
        peak_host_gib: Peak memory of the run so far.
    """

    kept_channels: list[int]
    expert_tokens: list[int]
    head_importance: list[float]
    channel_importance: list[float]
    attention_statistics: str
    attention_error_before: float
    attention_error_after: float
    ffn_error_before: float
    ffn_error_after: float


@dataclass(frozen=True)
class PrunedParts:
    """Results of pruning a layer.

    Attributes:
        before, after: Its sizes before and after pruning.
        heads, channels: Results for its attention and its FFN; None: nothing was removed there.
        by_group: Whether the units of attention are KV groups.
    """

    before: LayerSizes
    after: LayerSizes
    heads: PrunedSublayer | None
    channels: PrunedSublayer | None
    by_group: bool


def layer_report(parts: PrunedParts, **measured: Any) -> LayerReport:
    """Build the entry of a layer that has just been pruned; `measured` has the keys that do not follow from its parts."""
    before, after, heads, channels = parts.before, parts.after, parts.heads, parts.channels
    report: LayerReport = {
        **measured,  # type: ignore[typeddict-item]
        "num_heads_before": before.num_heads,
        "num_kv_heads_before": before.num_kv_heads,
        "intermediate_size_before": before.intermediate_size,
        "num_heads": after.num_heads,
        "num_kv_heads": after.num_kv_heads,
        "intermediate_size": after.intermediate_size,
        "kept_heads": list(range(after.num_heads)),
        "kept_kv_heads": list(range(after.num_kv_heads)),
    }
    if heads and heads.kept is not None:
        units, group = heads.kept, torch.arange(before.group_size)
        of_units = (units[:, None] * before.group_size + group).flatten() if parts.by_group else units
        report["kept_heads"] = of_units.tolist()
        report["kept_kv_heads"] = units.tolist() if parts.by_group else list(range(before.num_kv_heads))
        report["head_importance"] = heads.importance
        report["attention_statistics"] = heads.statistics
    if not channels:
        report["kept_channels"] = list(range(after.intermediate_size))
    elif channels.kept is None:
        report["expert_tokens"] = channels.expert_tokens or []
    else:
        report["kept_channels"] = channels.kept.tolist()
        report["channel_importance"] = channels.importance
    for part, pruned in (("attention", heads), ("ffn", channels)):
        for when in ("before", "after"):
            if pruned and (error := getattr(pruned, f"error_{when}")) is not None:
                report[f"{part}_error_{when}"] = error  # type: ignore[literal-required]
    return report


def notes_of_experts(layers: list[LayerReport]) -> list[str]:
    """Return what is to be said of experts that saw few calibration tokens, in sentences without a full stop."""
    seen = [(count, layer["intermediate_size_before"]) for layer in layers for count in layer.get("expert_tokens", [])]
    none, few = sum(count == 0 for count, _ in seen), sum(0 < count < 2 * width for count, width in seen)
    notes = []
    if none:
        notes.append(f"{none} of {len(seen)} experts saw no calibration tokens; their smallest channels were removed")
    if few:
        notes.append(
            f"{few} of {len(seen)} experts saw fewer than two calibration tokens for each of their channels; give more "
            "samples, or text that is more like what the model is for"
        )
    return notes
