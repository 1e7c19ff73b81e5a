"""The tables of the documentation, made from benchmarks/results: between `<!-- table NAME -->` and `<!-- end -->`.

    python benchmarks/tables.py            write them
    python benchmarks/tables.py --check    say whether they are up to date, exit code 1 if not

Of each setting the rows of the newest commit that measured it count, on a CPU and of a clean tree; medians over its runs.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ROOT = RESULTS.parent.parent
PAGES = [ROOT / name for name in ("README.md", "docs/benchmarks.md", "benchmarks/NOTES.md")]
PICTURE = ROOT / "docs" / "perplexity.png"
SHOWN = {"best": "best", "slimllm": "the paper's method (default)", "flap": "FLAP", "wanda-sp": "Wanda-sp"}
Rows = list[dict[str, Any]]
# Of text that is measured on: of the same source as the calibration, or of the other.
KINDS = ("own kind", "other kind")


def newest(name: str, keys: tuple[str, ...], wanted: Callable[[dict[str, Any]], bool]) -> list[Rows]:
    """The rows of every setting, which `keys` tell apart: those of the last commit that measured it."""
    path = RESULTS / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    settings: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        if row["commit"].endswith("-dirty") or not wanted(row):
            continue
        same = settings.setdefault(tuple(row.get(key) for key in keys), [])
        if same and same[0]["commit"] != row["commit"]:
            same.clear()
        same.append(row)
    return list(settings.values())


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines])


def median(rows: Rows, value: Callable[[dict[str, Any]], float]) -> float:
    """Over the runs of a setting."""
    return statistics.median(map(value, rows))


def spread(rows: Rows, key: str) -> str:
    """The median, and the least and the most."""
    values = sorted(row[key] for row in rows)
    return f"{statistics.median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})"


def whole_models() -> list[Rows]:
    """The demo's model, all of it, on a CPU."""

    def wanted(row: dict[str, Any]) -> bool:
        of_demo = row["model"].startswith("SmolLM2-135M-Instruct") and row.get("layers", 0) is None
        return of_demo and row["device"] == "cpu" and row["compute_dtype"] == "float32"

    return newest("prune", ("weights", "preset", "recovery", "ratio", "samples", "seq_len"), wanted)


def prune_table() -> str:
    """Whole models, real weights."""

    settings = whole_models()
    return table(
        [
            "input",
            "preset",
            "recovery",
            "ratio",
            "calibration",
            "pruning",
            "dense pass",
            "pruning / dense",
            "× floor",
            "peak",
            "estimate",
        ],
        [
            [
                rows[0]["weights"],
                rows[0]["preset"],
                rows[0]["recovery"],
                f"{rows[0]['ratio']:.0%}",
                f"{rows[0]['samples']} × {rows[0]['seq_len']}",
                f"{median(rows, lambda r: r['elapsed_s']):.1f} s",
                f"{median(rows, lambda r: r['dense_pass_s']):.1f} s",
                spread(rows, "ratio_to_dense_pass"),
                f"{median(rows, lambda r: r['times_floor']):.2f}",
                f"{median(rows, lambda r: r['peak_host_gib']):.2f} GiB",
                f"{median(rows, lambda r: sum(r['memory_gib'].values())):.2f} GiB",
            ]
            for rows in settings
        ],
    )


def stages_table() -> str:
    """Seconds of each stage and its floor."""

    settings = whole_models()
    stages = ("read", "dense pass", "forward", "statistics", "heads", "channels", "recovery", "write", "perplexity")

    def cell(rows: Rows, stage: str) -> str:
        floor = f" / {median(rows, lambda r: r['floors_s'][stage]):.2f}" if stage in rows[0]["floors_s"] else ""
        return f"{median(rows, lambda r: r['stages_s'].get(stage, 0.0)):.2f}{floor}"

    def title(row: dict[str, Any]) -> str:
        return f"{row['weights']}, {row['preset']}, {row['recovery']}, {row['ratio']:.0%}"

    return table(
        ["input, preset, recovery, ratio", *stages],
        [[title(rows[0]), *(cell(rows, stage) for stage in stages)] for rows in settings],
    )


def naive_table() -> str:
    """One layer against the plain algorithm."""
    settings = newest("naive", ("hidden_size", "tokens"), lambda row: row["device"] == "cpu")
    settings.sort(key=lambda rows: (rows[0]["hidden_size"], rows[0]["tokens"]))
    return table(
        ["hidden", "heads", "intermediate", "tokens", "engine", "plain", "speed-up", "engine's memory", "plain's", "ratio"],
        [
            [
                *(str(rows[0][key]) for key in ("hidden_size", "num_heads", "intermediate_size", "tokens")),
                f"{median(rows, lambda r: r['engine_s']):.3f} s",
                f"{median(rows, lambda r: r['naive_s']):.1f} s",
                f"{median(rows, lambda r: r['speedup']):.0f} ×",
                f"{median(rows, lambda r: 1024 * r['engine_gib']):.0f} MiB",
                f"{median(rows, lambda r: 1024 * r['naive_gib']):.0f} MiB",
                f"1/{median(rows, lambda r: r['memory_ratio']):.0f}",
            ]
            for rows in settings
        ],
    )


def recovery_table() -> str:
    """Held-out perplexity and cost of the recoveries."""
    settings = newest("recovery", ("recovery", "ratio", "samples"), lambda row: row.get("ridge") is None)
    found = {(rows[0]["recovery"], rows[0]["ratio"]): rows[-1] for rows in settings}

    def cell(recovery: str, ratio: float) -> str:
        row = found[recovery, ratio]
        digits = 1 if row["perplexity"] < 1000 else 0
        return f"{row['perplexity']:,.{digits}f} ({row['elapsed_s'] / row['dense_pass_s']:.1f} ×)"

    names = [("none", "`none`"), ("affine", "`affine`, the paper's"), ("lstsq", "`lstsq`")]
    return table(["`--recovery`", "20 %", "50 %"], [[title, cell(name, 0.2), cell(name, 0.5)] for name, title in names])


def accuracy_table() -> str:
    """How much every method loses on held-out text of the calibration's own kind, and of another kind."""
    settings = grouped(lambda row: row["samples"] == 32, ("mha", "calibration", "method"))

    def line(key: tuple[Any, ...], rows: Rows) -> list[str]:
        model = "MHA" if key[0] else "GQA"
        return [f"{model}, {key[1]}", key[2], *increases(rows, (0.2, 0.35, 0.5)), str(len({row["seed"] for row in rows}))]

    header = ["model, calibrated on", "method", *(f"{ratio}, {kind}" for ratio in ("20%", "35%", "50%") for kind in KINDS)]
    return table([*header, "seeds"], [line(key, rows) for key, rows in settings])


def summary() -> dict[str, dict[tuple[float, str], tuple[float, float]]]:
    """By method: perplexity in windows of 512 tokens and parameters of the layers, by ratio and kind of text.

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
    """Four methods at two ratios."""
    found = summary()
    lines = [["dense", *(f"{found['dense'][0.0, kind][0]:.1f}" for _ in range(2) for kind in KINDS)]]
    lines += [
        [title, *(f"{found[method][ratio, kind][0]:,.1f}" for ratio in (0.2, 0.5) for kind in KINDS)]
        for method, title in SHOWN.items()
    ]
    return table(["method", *(f"{ratio}, {kind}" for ratio in ("20 %", "50 %") for kind in KINDS)], lines)


def draw(path: Path) -> None:
    """Perplexity over parameters, for the four methods."""
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
    """What more calibration tokens give."""
    settings = grouped(lambda row: not row["mha"] and row["calibration"] == "wikitext", ("method", "samples"))
    with_more = {key[0] for key, _ in settings if key[1] > 32}
    lines = [
        [key[0], f"{key[1] * 128:,}", *increases([row for row in rows if row["seed"] == 0], (0.2, 0.5))]
        for key, rows in sorted(settings, key=lambda entry: entry[0])
        if key[0] in with_more
    ]
    return table(["method", "tokens", *(f"{ratio}, {kind}" for ratio in ("20%", "50%") for kind in KINDS)], lines)


def grouped(wanted: Callable[[dict[str, Any]], bool], keys: tuple[str, ...]) -> list[tuple[tuple[Any, ...], Rows]]:
    """The rows of accuracy.jsonl by some of their settings, the best at 50 % first; of each setting the newest."""
    every = ("model", "mha", "method", "ratio", "calibration", "samples", "seed")
    groups: dict[tuple[Any, ...], Rows] = {}
    for rows in newest("accuracy", every, wanted):
        groups.setdefault(tuple(rows[-1][key] for key in keys), []).append(rows[-1])

    def rank(entry: tuple[tuple[Any, ...], Rows]) -> tuple[Any, ...]:
        hardest = [increase(row, text, 512) for row in entry[1] if row["ratio"] == 0.5 for text in ("bundled", "wikitext")]
        return (*entry[0][:-1], statistics.mean(hardest) if hardest else math.inf)

    return sorted(groups.items(), key=rank)


def increase(row: dict[str, Any], text: str, window: int) -> float:
    """Of the logarithm of the perplexity over the dense model's."""
    name = f"{text} {window}"
    return math.log(row["perplexity"][name] / row["perplexity_dense"][name])


def increases(rows: Rows, ratios: tuple[float, ...]) -> list[str]:
    """For each ratio, on the calibration's own kind of text and on the other: in windows of 128 / of 512."""
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


def large_table() -> str:
    """Some layers of models that are larger than the machine's memory."""
    settings = newest("large", ("model", "layers", "recovery", "host_memory"), lambda row: row["device"] == "cpu")
    settings.sort(key=lambda rows: (rows[0]["model"], rows[0]["recovery"], rows[0]["layers"]))

    def line(rows: Rows) -> list[str]:
        first = rows[0]
        return [
            first["model"],
            str(first["layers"]),
            first["recovery"],
            first["host_memory"] or "none",
            f"{median(rows, lambda r: statistics.mean(r['layer_s'])):.0f} s",
            f"{median(rows, lambda r: r['elapsed_s']):.0f} s",
            f"{median(rows, lambda r: r['ratio_to_dense_pass']):.2f}",
            f"{median(rows, lambda r: r['peak_host_gib']):.2f} GiB",
            f"{median(rows, lambda r: r['predicted_gib']):.2f} GiB",
            f"{median(rows, lambda r: r['predicted_over_peak']):.2f}",
        ]

    header = [
        "layers of",
        "number",
        "recovery",
        "budget",
        "pruning a layer",
        "all",
        "pruning / dense",
        "peak",
        "plan",
        "plan / peak",
    ]
    return table(header, [line(rows) for rows in settings])


def latency_table() -> str:
    """Generation of the dense and of pruned models, measured in turn."""
    settings = newest("latency", ("preset", "ratio", "batch_size", "prompt"), lambda row: row["device"] == "cpu")
    found = {tuple(rows[0][key] for key in ("preset", "ratio", "batch_size", "prompt")): rows for rows in settings}
    models = dict.fromkeys(key[:2] for key in found)
    shapes = dict.fromkeys(key[2:] for key in found)

    def cell(rows: Rows, name: str) -> str:
        rate, times = median(rows, lambda r: r[f"{name}_per_s"]), median(rows, lambda r: r[f"{name}_speedup"])
        return f"{rate:,.0f} ({times:.2f} ×)" if rows[0]["ratio"] else f"{rate:,.0f}"

    def line(model: tuple[Any, ...]) -> list[str]:
        first = found[model + next(iter(shapes))][0]
        macs = f"{first['prefill_macs'] / 1e6:.0f} / {first['decode_macs'] / 1e6:.0f}"
        name = f"{model[0]}, {model[1]:.0%}" if model[1] else "dense"
        cells = [cell(found[model + shape], what) for shape in shapes for what in ("prefill", "decode")]
        return [name, f"{first['parameters'] / 1e6:.1f} M", macs, f"{first['memory_gib']:.2f} GiB", *cells]

    header = [f"{batch} × {prompt}: {what}" for batch, prompt in shapes for what in ("prefill", "decode")]
    return table(["", "parameters", "MMAC/token", "memory", *header], [line(model) for model in models])


TABLES = {
    "prune": prune_table,
    "stages": stages_table,
    "naive": naive_table,
    "recovery": recovery_table,
    "large": large_table,
    "accuracy": accuracy_table,
    "summary": summary_table,
    "calibration": calibration_table,
    "latency": latency_table,
}


def fill(page: str) -> str:
    """The page with its tables made anew."""

    def made(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", made, page, flags=re.DOTALL)


def main() -> None:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        if (filled := fill(page)) == page:
            continue
        if check:
            sys.exit(f"{path.name} is out of date; run make tables.")
        path.write_text(filled, encoding="utf-8")
        print(f"{path.name} has new tables.")
    if not check:
        draw(PICTURE)


if __name__ == "__main__":
    main()
