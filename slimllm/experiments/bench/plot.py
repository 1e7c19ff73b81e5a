"""Plots of measured runs: stacked bars by stage, and curves of time over tokens, width and layers."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from slimllm.errors import InputError

# Stages in the order of the run, with fixed colours, so that a stage looks the same in every picture.
STAGES = {
    "read": "#9aa0a6",
    "dense pass": "#1f5fa8",
    "allocation": "#17807e",
    "sensitivity": "#6fb98f",
    "forward": "#5b9bd5",
    "statistics": "#e07b39",
    "heads": "#c44e52",
    "channels": "#8e5ea2",
    "recovery": "#3a9a5b",
    "write": "#5f6368",
    "perplexity": "#d9c36b",
    "other": "#dddddd",
}
_FIXED = (
    "model",
    "layers",
    "ratio",
    "preset",
    "recovery",
    "samples",
    "seq_len",
    "device",
    "compute_dtype",
    "weights",
    "machine",
)
_MOST_BARS = 16


def check_picture(path: Path) -> None:
    """Check that a file name is one of a picture.

    Raises:
        ValueError: (as InputError) the name ends neither with .png nor with .svg.
    """
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"The picture must be a .png or .svg file, got {path.name}.")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the median run of every setting at its newest commit into a PNG or SVG file.

    Args:
        rows: Rows of `measure`, oldest first.
        path: The file to write, `.png` or `.svg`.

    Raises:
        ValueError: (as InputError) there is nothing to draw, or the file has another suffix.
    """
    check_picture(path)
    rows = [row for row in rows if "stages_s" in row and "floors_s" in row]
    if not rows:
        raise InputError("There is no measured run to draw; run slimllm bench without --plot first.")
    from matplotlib.figure import Figure

    newest = _medians(rows)
    bars = newest[-_MOST_BARS:]
    curves = [(title, unit, found) for title, name, unit in _CURVES if (found := _series(newest, name))]
    height = 0.9 + 0.55 * len(bars)
    figure = Figure(figsize=(11, height + (4 if curves else 0)), layout="constrained")
    grid = figure.add_gridspec(2 if curves else 1, max(1, len(curves)), height_ratios=[height, 4] if curves else [1])
    _bars(figure.add_subplot(grid[0, :]), bars)
    for column, (title, unit, found) in enumerate(curves):
        axes = figure.add_subplot(grid[1, column])
        for name, points in found.items():
            fit = _fit(points, unit) if unit != _CURVES[1][2] else ""
            axes.plot(*zip(*points), marker="o", label=name + fit)
        axes.set(title=f"time over {title}", xlabel=unit, ylabel="seconds", xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InputError(f"The picture {path} cannot be written: {error.strerror}.") from None


def _fit(points: list[tuple[float, float]], unit: str) -> str:
    """Label three or more points with the straight line fitted to them and its R²; empty for fewer points."""
    if len(points) < 3:
        return ""
    x, y = np.array(points).T
    slope, start = np.polyfit(x, y, 1)
    left = ((y - slope * x - start) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    scale, name = (1000, "1000 tokens") if unit.endswith("tokens") else (1, "layer")
    return f"\n{start:.2f} s + {scale * slope:.2f} s/{name}, R² = {1 - left:.4f}"


def _medians(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for every setting the run of median time among those of its newest commit."""
    settings: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        same = settings.setdefault(tuple(str(row.get(name)) for name in _FIXED), [])
        if same and same[0]["commit"] != row["commit"]:
            same.clear()
        same.append(row)
    return [sorted(same, key=lambda row: row["elapsed_s"])[len(same) // 2] for same in settings.values()]


def _bars(axes: Any, rows: list[dict[str, Any]]) -> None:
    for position, row in enumerate(rows):
        seconds = {stage: row["stages_s"].get(stage, 0.0) for stage in STAGES}
        seconds["other"] = max(0.0, row["elapsed_s"] - sum(row["stages_s"].values()))
        left = 0.0
        for stage, color in STAGES.items():
            axes.barh(position, seconds[stage], left=left, color=color, label=stage if position == 0 else None)
            left += seconds[stage]
        axes.plot(
            [row["floor_s"]] * 2, [position - 0.4, position + 0.4], color="black", label=None if position else "floor"
        )
        axes.annotate(f" {row['ratio_to_dense_pass']:.2f} × dense pass", (left, position), va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [_title(row) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="seconds")
    axes.margins(x=0.16)
    axes.legend(ncols=6, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def _title(row: dict[str, Any]) -> str:
    layers = f", {row['num_layers']} layers" if row["layers"] else ""
    return f"{row['model']}{layers}, {row['ratio']:.0%}\n{row['samples']} × {row['seq_len']}, {row['recovery']}"


def _tokens(row: dict[str, Any]) -> float:
    return float(row["samples"] * row["seq_len"])


def _width(row: dict[str, Any]) -> float:
    return float((row["parameters"]["layers_before"] / row["num_layers"]) ** 0.5)


# Title of the plot, name of the quantity that varies, and label of its axis.
_CURVES = (
    ("tokens", "tokens", "calibration tokens"),
    ("width, of one layer", "width", "√(parameters of a layer)"),
    ("layers", "layers", "layers"),
)


def _series(rows: list[dict[str, Any]], varying: str) -> dict[str, list[tuple[float, float]]]:
    """Return curves of at least two points along which only `varying` changes; over width, time is that of one layer."""
    found: dict[str, dict[float, float]] = defaultdict(dict)
    about = ("preset", "seq_len", "compute_dtype", "device", "weights", "machine")
    differing = [name for name in about if len({str(row[name]) for row in rows}) > 1]
    for row in rows:
        tokens, layers = f"{_tokens(row):.0f} tokens", f"{row['num_layers']} layers"
        parts, at = {
            "tokens": ([row["model"], layers], _tokens(row)),
            "layers": ([row["model"], tokens], float(row["num_layers"])),
            "width": ([f"of {layers}", tokens], _width(row)),
        }[varying]
        label = ", ".join([*parts, f"{row['ratio']:.0%}", row["recovery"], *(str(row[name]) for name in differing)])
        # Perplexity needs the output head, which is not part of a layer.
        outside = row["stages_s"].get("perplexity", 0.0) if varying == "width" else 0.0
        found[label][at] = (row["elapsed_s"] - outside) / (row["num_layers"] if varying == "width" else 1)
    return {label: sorted(points.items()) for label, points in found.items() if len(points) > 1}
