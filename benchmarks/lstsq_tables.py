"""Tables of least squares, of heads and of large systems, for tables.py."""

from __future__ import annotations

import math
import re
import statistics

from rows import Rows, newest, table


def lstsq_table() -> str:
    """Systems of least squares against torch's batched Cholesky."""

    def line(rows: Rows) -> list[str]:
        ours, fp32, fp64 = (
            statistics.median(row["seconds"][name] for row in rows) for name in ("ours", "torch", "torch fp64")
        )
        errors = [statistics.median(row[name] for row in rows) for name in ("error", "error_torch")]
        digits = max(0, 1 - math.floor(math.log10(1e3 * ours)))
        return [
            *re.findall(r"\d+", rows[0]["what"]),
            f"{1e3 * ours:.{digits}f} ms",
            f"{fp32 / ours:.2f}",
            f"{fp64 / ours:.2f}",
            *(f"{error:.0e}".replace("e-0", "e-") for error in errors),
        ]

    settings = newest("lstsq", ("what",), lambda row: "torch fp64" in row["seconds"] and "Xeon" in row["machine"])
    header = ["systems", "unknowns", "right-hand sides", "slimllm", "× torch fp32", "× torch fp64", "error", "torch fp32's"]
    return table(header, [line(rows) for rows in settings])


def heads_table() -> str:
    """Quadratic forms and half-solutions of a layer's heads against torch's batched Cholesky and substitution."""

    def line(rows: Rows) -> list[str]:
        seconds = {name: statistics.median(row["seconds"][name] for row in rows) for name in rows[0]["seconds"]}
        forms, half = seconds["quadratic forms"], seconds["ours"]
        return [
            *re.findall(r"\d+", rows[0]["what"]),
            f"{1e3 * forms:.2f} ms",
            f"{seconds['quadratic forms, torch'] / forms:.1f}",
            f"{1e3 * half:.2f} ms",
            f"{seconds['torch'] / half:.1f}",
            f"{seconds['numpy'] / half:.0f}",
        ]

    settings = newest("lstsq", ("what",), lambda row: row["what"].startswith("heads"))
    header = ["matrices", "rows", "right-hand sides", "`quadratic_forms`", "× torch", "`half_solve_`", "× torch", "× numpy"]
    return table(header, [line(rows) for rows in settings])


def systems_table() -> str:
    """Make the table of large systems, in place, against torch in one piece."""

    def line(rows: Rows) -> list[str]:
        cells = re.findall(r"\d+", rows[0]["what"])[:2]
        for step in ("factor", "solve", "inverse"):
            ours, torchs = (statistics.median(row["seconds"][name] for row in rows) for name in (step, f"{step}, torch"))
            cells += [f"{ours:.2f} s", f"{torchs / ours:.2f}"]
        for kind in ("", ", torch"):
            names = [f"{step}{kind}" for step in ("factor", "solve", "inverse")]
            most = statistics.median(max(row["extra_gib"][name] for name in names) for row in rows)
            cells.append(f"{most:.2f} GiB")
        return cells

    settings = newest("lstsq", ("what",), lambda row: row["what"].startswith("large"))
    steps = (h for step in ("factor", "solve", "inverse") for h in (step, "× torch"))
    return table(
        ["unknowns", "right-hand sides", *steps, "most memory beside them", "torch's"], [line(rows) for rows in settings]
    )
