"""Pictures of a pruning run, drawn from its report: each has a title, a caption and a drawing function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import MaxNLocator

from slimllm.finetuning.report import FinetuneReport
from slimllm.pruning.layer_report import LayerReport
from slimllm.pruning.report import PruneReport
from slimllm.report.palette import STYLE, Palette

_WIDTH, _HEIGHT = 4.6, 2.75  # inches; the text is still legible at a phone's width


@dataclass(frozen=True)
class Picture:
    """A picture's title, caption and drawing function; `draw` returns None if there is nothing to draw."""

    name: str
    title: str
    caption: str
    draw: Callable[[PruneReport, FinetuneReport | None, Palette], Figure | None]


def _figure(palette: Palette, height: float = _HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    _paint(axes, palette)
    return figure, axes


def _paint(axes: Axes, palette: Palette) -> None:
    axes.tick_params(colors=palette.ink)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_color(palette.ink)
    for spine in axes.spines.values():
        spine.set_color(palette.grid)


def _legend(axes: Axes, palette: Palette, columns: int = 3) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=columns,
            frameon=False,
            labelcolor=palette.ink,
            fontsize=10,
            handlelength=1.2,
            columnspacing=1.0,
        )


def _by_layer(axes: Axes, palette: Palette) -> None:
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=palette.grid, linewidth=0.6)
    axes.set_axisbelow(True)


def _shares(report: PruneReport, _: FinetuneReport | None, palette: Palette) -> Figure:
    """Draw the removed fractions of every layer's heads and channels."""
    figure, axes = _figure(palette)
    layers = np.arange(len(report.layers))
    heads, channels = (np.array([_share_gone(layer)[part] for layer in report.layers]) for part in range(2))
    axes.bar(layers - 0.2, 100 * heads, 0.4, color=palette.second, label="heads")
    axes.bar(layers + 0.2, 100 * channels, 0.4, color=palette.first, label="FFN channels")
    whole = [100 * (1 - layer["parameters_after"] / layer["parameters_before"]) for layer in report.layers]
    axes.plot(layers, whole, ".", color=palette.ink, markersize=4, label="parameters")
    axes.set_ylabel("removed, %")
    axes.set_ylim(0, 100)
    _by_layer(axes, palette)
    _legend(axes, palette)
    return figure


def _share_gone(layer: LayerReport) -> tuple[float, float]:
    """Return the removed fractions of a layer's heads and channels."""
    heads, channels = layer["num_heads_before"], layer["intermediate_size_before"]
    return 1 - layer["num_heads"] / heads, 1 - layer["intermediate_size"] / channels


def _heads(report: PruneReport, _: FinetuneReport | None, palette: Palette) -> Figure:
    """Draw a cell for every head of every layer."""
    most = max(layer["num_heads_before"] for layer in report.layers)
    figure, axes = _figure(palette, min(5.0, max(1.9, 0.9 + 0.13 * most)))
    kept: list[tuple[int, int]] = []
    gone: list[tuple[int, int]] = []
    for column, layer in enumerate(report.layers):
        there = set(layer["kept_heads"])
        for head in range(layer["num_heads_before"]):
            (kept if head in there else gone).append((column, head))
    if kept:
        axes.add_patch(PathPatch(_cells(kept, 0.42), facecolor=palette.first, edgecolor="none", label="kept"))
    if gone:  # not by colour alone
        style = {"facecolor": "none", "edgecolor": palette.gone, "linewidth": 0.8}
        axes.add_patch(PathPatch(_cells(gone, 0.36), label="removed", **style))
    axes.set_xlim(-0.6, len(report.layers) - 0.4)
    axes.set_ylim(most - 0.4, -0.6)
    axes.set_ylabel("head")
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    _by_layer(axes, palette)
    axes.grid(False)
    _legend(axes, palette)
    return figure


def _cells(cells: list[tuple[int, int]], half: float) -> Outline:
    """Return squares as one outline, which keeps the file small."""
    square = half * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)])
    points = (np.array(cells, dtype=float)[:, None] + square).reshape(-1, 2)
    return Outline(points, [Outline.MOVETO, *[Outline.LINETO] * 3, Outline.CLOSEPOLY] * len(cells))


def _importance(report: PruneReport, _: FinetuneReport | None, palette: Palette) -> Figure | None:
    """Draw quantiles of channel importance, relative to the layer's median, and the 95 % quantile of removed channels."""
    found = [(layer["index"], layer) for layer in report.layers if "channel_importance" in layer]
    if not found:
        return None
    figure, axes = _figure(palette)
    at, bands, cuts = [], [], []
    for index, layer in found:
        values = np.array(layer["channel_importance"], dtype=float)
        gone = np.ones(len(values), dtype=bool)
        gone[layer["kept_channels"]] = False
        middle = np.median(values[values > 0]) if (values > 0).any() else 1.0
        values = np.maximum(values / middle, 1e-3)
        at.append(index)
        bands.append(np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95]))
        cuts.append(np.quantile(values[gone], 0.95))
    low, lower, middle_line, upper, high = np.array(bands).T
    axes.fill_between(at, low, high, color=palette.first, alpha=0.18, linewidth=0, label="9 of 10 channels")
    axes.fill_between(at, lower, upper, color=palette.first, alpha=0.35, linewidth=0, label="half of them")
    axes.plot(at, middle_line, color=palette.first, linewidth=1.4)
    axes.plot(at, cuts, color=palette.second, linewidth=1.4, marker=".", label="the cut")
    axes.set_yscale("log")
    axes.set_ylabel("importance / median")
    _by_layer(axes, palette)
    _legend(axes, palette)
    return figure


def _errors(report: PruneReport, _: FinetuneReport | None, palette: Palette) -> Figure | None:
    """Draw the error of every sub-layer's output, without and with recovery."""
    figure, axes = _figure(palette)
    some = False
    for part, color, label in (("attention", palette.second, "attention"), ("ffn", palette.first, "FFN")):
        names = [f"{part}_error_{when}" for when in ("before", "after")]
        found: list[Mapping[str, Any]] = [layer for layer in report.layers if names[1] in layer]
        if not found:
            continue
        some = True
        at = [layer["index"] for layer in found]
        before, after = ([100 * layer[name] for layer in found] for name in names)
        axes.vlines(at, after, before, color=color, alpha=0.35, linewidth=1.2)
        axes.plot(at, before, "o", color=color, markersize=4, fillstyle="none", label=f"{label}, without")
        axes.plot(at, after, "o", color=color, markersize=4, label=f"{label}, with")
    axes.set_ylabel("error of the output, %")
    axes.set_yscale("log")  # the error of a head that writes one large constant is a thousand times the rest
    _by_layer(axes, palette)
    _legend(axes, palette, 2)
    return figure if some else None


def _parts(parts: dict[str, float], unit: str, palette: Palette) -> Figure:
    """Draw a bar for each part of a total, the largest first."""
    shown = sorted(((value, name) for name, value in parts.items() if value > 0.003 * sum(parts.values())), reverse=True)
    figure, axes = _figure(palette, 0.8 + 0.27 * len(shown))
    axes.barh([name for _, name in shown], [value for value, _ in shown], color=palette.first, height=0.62)
    for row, (value, _) in enumerate(shown):
        axes.annotate(f" {value:.3g}", (value, row), va="center", color=palette.ink, fontsize=10)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set_xlabel(unit)
    axes.grid(axis="x", color=palette.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    return figure


def _seconds(report: PruneReport, _: FinetuneReport | None, palette: Palette) -> Figure:
    """Draw the seconds of each stage."""
    stages = {**report.stages_s, "other": max(0.0, report.elapsed_s - sum(report.stages_s.values()))}
    return _parts(stages, "seconds", palette)


def _memory(report: PruneReport, _: FinetuneReport | None, palette: Palette) -> Figure:
    """Draw the memory estimate of the peak, made before the run."""
    parts = {name.replace("_", " "): 1024 * size for name, size in (report.gpu_memory_gib or report.memory_gib).items()}
    return _parts(parts, f"MiB of {'the GPU' if report.gpu_memory_gib else 'memory'}", palette)


def _training(_: PruneReport, trained: FinetuneReport | None, palette: Palette) -> Figure | None:
    """Draw the loss of the training after pruning."""
    if trained is None:
        return None
    figure, axes = _figure(palette)
    axes.plot(range(1, len(trained.loss) + 1), trained.loss, color=palette.first, linewidth=1, label="of each step")
    if trained.held_out:
        axes.plot(*zip(*trained.held_out), color=palette.second, marker="o", markersize=4, label="held-out examples")
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.grid(color=palette.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    _legend(axes, palette)
    return figure


PICTURES = (
    Picture(
        "shares",
        "Removed from each layer",
        "Fraction of the attention heads, FFN channels and parameters that was removed.",
        _shares,
    ),
    Picture("heads", "Kept and removed heads", "Each square is an attention head of a layer.", _heads),
    Picture(
        "importance",
        "Importance of the channels",
        "Distribution of the importance of each layer's FFN channels, relative to the layer's median; each channel is "
        "scored alone. 95 % of the removed channels lie below the cut; where the cut is in the middle of the band, many "
        "channels had to be removed.",
        _importance,
    ),
    Picture(
        "errors",
        "Error of the outputs",
        "Error of each sub-layer's output on the calibration text, in % of its "
        "variance: without the recovery (open dots) and with it (full dots).",
        _errors,
    ),
    Picture("seconds", "Time by stage", "Seconds of the run by stage.", _seconds),
    Picture("memory", "Memory by purpose", "The memory estimate of the peak, made before the run.", _memory),
    Picture("training", "Training after pruning", "Loss by step; lower is better.", _training),
)


def drawn(report: PruneReport, trained: FinetuneReport | None, palette: Palette) -> list[tuple[Picture, Figure]]:
    """Draw all pictures that a report has data for."""
    with matplotlib.rc_context(STYLE):
        figures = [(picture, picture.draw(report, trained, palette)) for picture in PICTURES]
    return [(picture, figure) for picture, figure in figures if figure is not None]
