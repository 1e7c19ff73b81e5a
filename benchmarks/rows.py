"""Rows of results, and helpers for tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Rows = list[dict[str, Any]]


def newest(name: str, keys: tuple[str, ...], wanted: Callable[[dict[str, Any]], bool]) -> list[Rows]:
    """Return the rows of every setting, as told apart by `keys`: those of the last commit that measured it."""
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
    """Format a Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines])


def median(rows: Rows, value: Callable[[dict[str, Any]], float]) -> float:
    """Return the median of a value over the runs of a setting."""
    return statistics.median(map(value, rows))


def spread(rows: Rows, key: str) -> str:
    """Format the median, and the smallest and largest value."""
    values = sorted(row[key] for row in rows)
    return f"{statistics.median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})"
