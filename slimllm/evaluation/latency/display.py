"""Output of `slimllm latency`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from slimllm.evaluation.latency.measure import Latency


def model_table(found: Latency) -> Table:
    """Make a table with a line for each model: its parameters, its work per token at the first shape, and its memory."""
    lines = [line for line in found.lines if line.shape == found.lines[0].shape]
    table = _table("parameters", f"MMAC/prompt token ({lines[0].shape.prompt})", "new token", "GiB")
    for line, memory in zip(lines, found.memory_gib):
        macs = [f"{macs / 1e6:,.1f}" for macs in (line.prefill_macs, line.decode_macs)]
        table.add_row(Path(line.model).resolve().name, f"{line.parameters:,}", *macs, f"{memory:.2f}")
    return table


def speed_table(found: Latency) -> Table:
    """Make a table with a line for each model and shape: medians over the rounds, and speed-ups over the first model."""
    several = len(found.memory_gib) > 1
    times = ["×"] if several else []
    table = _table("prompts", "first token", "prefill/s", *times, "decode/s", *times)
    for line in found.lines:
        cells = [
            Path(line.model).resolve().name,
            f"{line.shape.batch_size} × {line.shape.prompt}",
            f"{1000 * statistics.median(line.first_token_s):,.0f} ms {_spread(line.first_token_s)}".rstrip(),
            f"{statistics.median(line.prefill_rates):,.0f}",
        ]
        cells += [f"{found.speedup(line, 'prefill_rates'):.2f}"] if several else []
        cells += [f"{statistics.median(line.decode_rates):,.1f} {_spread(line.next_tokens_s)}".rstrip()]
        cells += [f"{found.speedup(line, 'decode_rates'):.2f}"] if several else []
        table.add_row(*cells)
    return table


def about_speeds(found: Latency) -> str:
    """Describe the conditions and the units of the two tables."""
    rounds = len(found.lines[0].first_token_s)
    words = f"{found.dtype} on {found.device}, {found.threads} threads, {found.lines[0].shape.new_tokens} new tokens: "
    words += f"medians of {rounds} rounds, ± half of their range" if rounds > 1 else "of a single round"
    words += "; ×: speed-up over the first model, measured in turns" if len(found.memory_gib) > 1 else ""
    return f"{words}. MMAC: millions of multiply-adds per token; GiB: memory including the weights."


def _table(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="bold")
    table.add_column("model", overflow="fold", min_width=10)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def _spread(values: list[float]) -> str:
    """Return half of the range in % of the median; empty for a single value."""
    if len(values) == 1:
        return ""
    return f"±{50 * (max(values) - min(values)) / statistics.median(values):.0f}%"


@contextmanager
def latency_progress(console: Console, quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """Show a progress bar until all measurements are done; yield the `progress` callback for `measure_latency`."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=quiet, transient=True) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda done, total, about: bar.update(task, completed=done, total=total, description=about)
