"""Tables of the documentation, made from benchmarks/results, between `<!-- table NAME -->` and `<!-- end -->`.

    python benchmarks/tables.py            write the tables
    python benchmarks/tables.py --check    check that they are up to date; the exit code is 1 if not

For each setting, the rows of the newest commit that measured it are used, on a CPU and of a clean tree; values are medians
over its runs.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from typing import Any

from accuracy_tables import accuracy_table, calibration_table, draw, summary_table
from lstsq_tables import heads_table, lstsq_table, systems_table
from rows import RESULTS, Rows, median, newest, spread, table

ROOT = RESULTS.parent.parent
PAGES = [ROOT / name for name in ("README.md", "docs/benchmarks.md", "docs/reference/operations.md", "benchmarks/NOTES.md")]
_OF_PRESETS = ("slimllm", "obs")  # criteria
PICTURE = ROOT / "docs" / "perplexity.png"


def whole_models() -> list[Rows]:
    """Return the rows of the demo's model, with all layers, on a CPU."""

    def wanted(row: dict[str, Any]) -> bool:
        of_demo = row["model"].startswith("SmolLM2-135M-Instruct") and row.get("layers", 0) is None
        return of_demo and row["device"] == "cpu" and row["compute_dtype"] == "float32"

    return newest("prune", ("weights", "preset", "recovery", "ratio", "samples", "seq_len"), wanted)


def _method(row: dict[str, Any]) -> str:
    """Return the preset of a row, or the criterion if the preset does not decide it."""
    given = row.get("criterion")
    return str(row["preset"] if given in (None, *_OF_PRESETS) else given)


def prune_table() -> str:
    """Make the table of whole models with real weights."""

    settings = whole_models()
    return table(
        [
            "input",
            "preset, method",
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
                _method(rows[0]),
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
    """Make the table of seconds of each stage and its floor."""

    settings = whole_models()
    stages = ("read", "dense pass", "forward", "statistics", "heads", "channels", "recovery", "write", "perplexity")

    def cell(rows: Rows, stage: str) -> str:
        floor = f" / {median(rows, lambda r: r['floors_s'][stage]):.2f}" if stage in rows[0]["floors_s"] else ""
        return f"{median(rows, lambda r: r['stages_s'].get(stage, 0.0)):.2f}{floor}"

    def title(row: dict[str, Any]) -> str:
        tokens = f", {row['samples']} windows" if row["samples"] != 32 else ""
        return f"{row['weights']}, {_method(row)}, {row['recovery']}, {row['ratio']:.0%}{tokens}"

    return table(
        ["input, preset, recovery, ratio", *stages],
        [[title(rows[0]), *(cell(rows, stage) for stage in stages)] for rows in settings],
    )


def naive_table() -> str:
    """Make the table of one layer against the plain algorithm."""
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
    """Make the table of held-out perplexity and cost of the recoveries."""
    settings = newest("recovery", ("recovery", "ratio", "samples"), lambda row: row.get("ridge") is None)
    found = {(rows[0]["recovery"], rows[0]["ratio"]): rows[-1] for rows in settings}

    def cell(recovery: str, ratio: float) -> str:
        row = found[recovery, ratio]
        digits = 1 if row["perplexity"] < 1000 else 0
        return f"{row['perplexity']:,.{digits}f} ({row['elapsed_s'] / row['dense_pass_s']:.1f} ×)"

    names = [("none", "`none`"), ("affine", "`affine`, the paper's"), ("lstsq", "`lstsq`")]
    return table(["`--recovery`", "20 %", "50 %"], [[title, cell(name, 0.2), cell(name, 0.5)] for name, title in names])


def large_table() -> str:
    """Make the table of layers of models that are larger than the machine's memory."""
    settings = newest("large", ("model", "layers", "preset", "recovery", "host_memory"), lambda row: row["device"] == "cpu")
    machine = max((rows[-1] for rows in settings), key=lambda row: row["date"])["machine"]  # others cannot be compared
    settings = [rows for rows in settings if rows[-1]["machine"] == machine]
    settings.sort(key=lambda rows: (rows[0]["model"], rows[0]["recovery"], rows[0]["layers"]))

    def line(rows: Rows) -> list[str]:
        first = rows[0]
        return [
            first["model"],
            str(first["layers"]),
            first["recovery"] if first["preset"] == "slimllm" else first["preset"],
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
    """Make the table of generation by the dense and pruned models, measured in turn."""
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


def contended_table() -> str:
    """Pruning beside another process, by OpenMP's way of waiting."""
    settings = newest("contended", ("preset", "condition", "waiting"), lambda row: row["waiting"] in _WAITING)
    found = {tuple(rows[0][key] for key in ("preset", "condition", "waiting")): rows for rows in settings}

    def cell(preset: str, condition: str, waiting: str) -> str:
        rows = found.get((preset, condition, waiting), [])
        idle = found.get((preset, "idle", waiting), [])
        if not rows or not idle:
            return ""
        seconds = median(rows, lambda r: r["elapsed_s"])
        times = f" ({seconds / median(idle, lambda r: r['elapsed_s']):.1f} ×)"
        if condition == "idle" or rows[0]["commit"] != idle[0]["commit"]:
            return f"{seconds:.1f} s"
        return f"{seconds:.1f} s{times}"

    lines = dict.fromkeys((preset, waiting) for preset, _, waiting in found)
    conditions = {"idle": "idle", "pinned": "one core taken", "free": "one other thread, not pinned"}
    return table(
        ["preset", "OpenMP's threads wait", *conditions.values()],
        [[preset, _WAITING[waiting], *(cell(preset, one, waiting) for one in conditions)] for preset, waiting in lines],
    )


_WAITING = {"spinning": "by spinning, OpenMP's default", "sharing": "briefly, while others need the cores"}

TABLES = {
    "prune": prune_table,
    "stages": stages_table,
    "naive": naive_table,
    "recovery": recovery_table,
    "lstsq": lstsq_table,
    "heads": heads_table,
    "systems": systems_table,
    "contended": contended_table,
    "large": large_table,
    "accuracy": accuracy_table,
    "summary": summary_table,
    "calibration": calibration_table,
    "latency": latency_table,
}


def fill(page: str) -> str:
    """Return the page with its tables updated."""

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
