"""Tables and plot of accuracy, from accuracy.jsonl."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rows import Rows, newest, table

SHOWN = {"best": "best (default)", "slimllm": "the paper's method", "flap": "FLAP", "wanda-sp": "Wanda-sp"}
# Evaluation text: from the same source as the calibration text, or from the other source.
KINDS = ("own kind", "other kind")


def accuracy_table() -> str:
    """Make the table of what every method loses on held-out text of the calibration's own kind and of another kind."""
    settings = grouped(lambda row: row["samples"] == 32, ("mha", "calibration", "method"))

    def line(key: tuple[Any, ...], rows: Rows) -> list[str]:
        model = "MHA" if key[0] else "GQA"
        counts = [len({row["seed"] for row in rows if row["ratio"] == ratio}) for ratio in (0.2, 0.35, 0.5)]
        return [f"{model}, {key[1]}", key[2], *increases(rows, (0.2, 0.35, 0.5)), ", ".join(map(str, counts))]

    header = ["model, calibrated on", "method", *(f"{ratio}, {kind}" for ratio in ("20%", "35%", "50%") for kind in KINDS)]
    return table([*header, "seeds"], [line(key, rows) for key, rows in settings])


def summary() -> dict[str, dict[tuple[float, str], tuple[float, float]]]:
    """Return perplexity in windows of 512 tokens and parameters of the layers, by method, then by ratio and kind of text.

    SmolLM2-135M with grouped queries, calibrated on WikiText-2; geometric means over seeds.
    """
    found: dict[str, dict[tuple[float, str], tuple[float, float]]] = {"dense": {}}
    groups = grouped(
        lambda row: row["samples"] == 32 and not row["mha"] and row["calibration"] == "wikitext", ("method", "ratio")
    )
    for (method, ratio), rows in groups:
        for kind, text in zip(KINDS, ("wikitext 512", "bundled 512")):
            value = math.exp(statistics.mean(math.log(row["perplexity"][text]) for row in rows))
            found.setdefault(method, {})[ratio, kind] = value, statistics.mean(row["parameters"] for row in rows)
            found["dense"][0.0, kind] = rows[0]["perplexity_dense"][text], math.nan
    return found


def summary_table() -> str:
    """Make the table of four methods at two ratios."""
    found = summary()
    lines = [["dense", *(f"{found['dense'][0.0, kind][0]:.1f}" for _ in range(2) for kind in KINDS)]]
    lines += [
        [title, *(f"{found[method][ratio, kind][0]:,.1f}" for ratio in (0.2, 0.5) for kind in KINDS)]
        for method, title in SHOWN.items()
    ]
    return table(["method", *(f"{ratio}, {kind}" for ratio in ("20 %", "50 %") for kind in KINDS)], lines)


def draw(path: Path) -> None:
    """Plot perplexity over parameters for the four methods."""
    from matplotlib.figure import Figure

    found = summary()
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    dense = found["dense"][0.0, KINDS[0]][0]
    for method, title in SHOWN.items():
        points = sorted(value[::-1] for (_, kind), value in found[method].items() if kind == KINDS[0])
        axes.plot([x / 1e6 for x, _ in points], [y for _, y in points], marker="o", label=title)
    axes.axhline(dense, color="black", linewidth=0.8, linestyle="--", label=f"dense, 106 M: {dense:.1f}")
    axes.set(xlabel="parameters of the decoder layers, M", ylabel="perplexity", yscale="log")
    axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=130)


def calibration_table() -> str:
    """Make the table of losses by number of calibration tokens."""
    settings = grouped(lambda row: not row["mha"] and row["calibration"] == "wikitext", ("method", "samples"))
    with_more = {key[0] for key, _ in settings if key[1] > 32}
    lines = [
        [key[0], f"{key[1] * 128:,}", *increases([row for row in rows if row["seed"] == 0], (0.2, 0.5))]
        for key, rows in sorted(settings, key=lambda entry: entry[0])
        if key[0] in with_more
    ]
    return table(["method", "tokens", *(f"{ratio}, {kind}" for ratio in ("20%", "50%") for kind in KINDS)], lines)


def grouped(wanted: Callable[[dict[str, Any]], bool], keys: tuple[str, ...]) -> list[tuple[tuple[Any, ...], Rows]]:
    """Group the newest row of each setting in accuracy.jsonl by some of its settings; the best at 50 % comes first."""
    every = ("model", "mha", "method", "ratio", "calibration", "samples", "seed")
    groups: dict[tuple[Any, ...], Rows] = {}
    for rows in newest("accuracy", every, wanted):
        groups.setdefault(tuple(rows[-1][key] for key in keys), []).append(rows[-1])

    def rank(entry: tuple[tuple[Any, ...], Rows]) -> tuple[Any, ...]:
        hardest = [increase(row, text, 512) for row in entry[1] if row["ratio"] == 0.5 for text in ("bundled", "wikitext")]
        return (*entry[0][:-1], statistics.mean(hardest) if hardest else math.inf)

    return sorted(groups.items(), key=rank)


def increase(row: dict[str, Any], text: str, window: int) -> float:
    """Return the increase of log-perplexity over the dense model."""
    name = f"{text} {window}"
    return math.log(row["perplexity"][name] / row["perplexity_dense"][name])


def increases(rows: Rows, ratios: tuple[float, ...]) -> list[str]:
    """Format the increases for each ratio, on the calibration's own kind of text and the other: windows of 128 / 512."""
    cells = []
    for ratio in ratios:
        here = [row for row in rows if row["ratio"] == ratio]
        for own in (True, False):
            cell = []
            for window in (128, 512):
                texts = [
                    (row, text) for row in here for text in ("bundled", "wikitext") if (text == row["calibration"]) == own
                ]
                values = [increase(row, text, window) for row, text in texts]
                spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
                cell += [f"{statistics.mean(values):.2f}{spread}"] if values else []
            cells.append(" / ".join(cell))
    return cells
