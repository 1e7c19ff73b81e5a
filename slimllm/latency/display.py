"""What `slimllm latency` prints."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from slimllm.latency.measure import Latency


def latency_table(found: Latency) -> Table:
    """A line for each model and shape: medians over the rounds, and how many times as fast as the first model."""
    several = len(found.memory_gib) > 1
    table = Table(box=None, padding=(0, 1), header_style="bold")
    table.add_column("model", overflow="fold", min_width=12)
    titles = ["prompts", "first token", "prefill/s", "×", "decode/s", "×", "MMAC/token", "parameters", "GiB"]
    for title in titles:
        if several or title != "×":
            table.add_column(title, justify="right", no_wrap=True)
    for number, line in enumerate(found.lines):
        cells = [
            Path(line.model).resolve().name,
            f"{line.shape.batch_size} × {line.shape.prompt}+{line.shape.new_tokens}",
            f"{1000 * statistics.median(line.first_token_s):,.1f} ms {_spread(line.first_token_s)}",
        ]
        for name in ("prefill_rates", "decode_rates"):
            rates = getattr(line, name)
            cells.append(f"{statistics.median(rates):,.1f} {_spread(rates)}")
            if several:
                cells.append(f"{found.speedup(line, name):.2f}")
        memory = found.memory_gib[number % len(found.memory_gib)]
        macs = f"{line.prefill_macs / 1e6:,.1f} / {line.decode_macs / 1e6:,.1f}"
        table.add_row(*cells, macs, f"{line.parameters:,}", f"{memory:.2f}")
    return table


def _spread(values: list[float]) -> str:
    """Half of the range in % of the median."""
    return f"± {50 * (max(values) - min(values)) / statistics.median(values):.0f} %"


@contextmanager
def latency_progress(console: Console, quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A bar over all measurements, gone when they are done; gives what `measure_latency` tells."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=16), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=quiet, transient=True) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda done, total, about: bar.update(task, completed=done, total=total, description=about)
