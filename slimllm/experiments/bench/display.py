"""`slimllm bench`: runs of all combinations of settings, with a file of results, a table and a picture."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from slimllm.errors import InputError
from slimllm.experiments.bench.plot import check_picture, draw
from slimllm.experiments.bench.run import Setting, append_rows, check_results_file, check_setting, measure, read_rows


def run_bench(
    console: Console,
    models: list[str],
    *,
    layers: list[Any],
    ratio: list[float],
    methods: list[dict[str, Any]],
    samples: list[int],
    rounds: int,
    workdir: Path | None,
    out: Path,
    plot: Path | None,
    **common: Any,
) -> None:
    """Measure every combination `rounds` times, in turns, and append each row to the file as soon as it is measured.

    Args:
        console: Console for the table.
        models, layers, ratio, methods, samples: Values to combine; methods are settings such as `criterion`.
        rounds: Runs of each combination.
        workdir, out, plot: Folder for models, file of results, picture.
        common: The other fields of `Setting`.

    Raises:
        ValueError: (as InputError) a setting is wrong, or there is neither a model nor a picture to draw.
    """
    if rounds < 1:
        raise InputError(f"rounds must be at least 1, got {rounds}.")
    if not models and plot is None:
        raise InputError("Give a model or the name of a shape to measure, or --plot FILE to draw earlier results.")
    check_results_file(out)
    if plot is not None:
        check_picture(plot)
    settings = [
        Setting(model=m, layers=k, ratio=r, samples=n, **chosen, **common)
        for m, k, r, chosen, n in itertools.product(models, layers, ratio, methods, samples)
    ]
    for setting in settings:
        check_setting(setting)
    rows: list[list[dict[str, Any]]] = [[] for _ in settings]
    for number in range(rounds):  # in turns, so that other load on the machine affects all settings alike
        for position, setting in enumerate(settings):
            method = getattr(setting.recovery, "name", setting.recovery) or setting.preset
            about = f"{setting.model}, {setting.ratio:g}, {method}, {setting.samples} × {setting.seq_len}"
            with console.status(f"{about}, round {number + 1} of {rounds}"):
                row = measure(setting, workdir)
            append_rows(out, [row])
            if row["load"] > 0.5:
                console.print(f"Other work kept {row['load']:.1f} cores busy before {about}.", style="dim", highlight=False)
            rows[position].append(row)
    if settings:
        console.print(results_table(rows))
        console.print(
            "Medians (and the range of × dense): seconds; time relative to one dense pass of the layers, and to the floor "
            "of the counted work; calibration tokens, layers and millions of layer parameters per second; peak memory. "
            f"All rows: {out}",
            style="dim",
            highlight=False,
        )
    if plot is not None:
        draw(read_rows(out), plot)
        console.print(f"The picture is {plot}.", highlight=False)


def results_table(rows: list[list[dict[str, Any]]]) -> Table:
    """Make a table with a line for each setting: medians over its runs."""
    table = Table(box=None, padding=(0, 1), header_style="bold")
    for title in ("setting", "s", "× dense", "× floor", "tokens/s", "layers/s", "M par./s", "GiB"):
        table.add_column(title, justify="left" if title == "setting" else "right", no_wrap=title != "setting")
    for of_setting in rows:
        first = of_setting[0]

        def median(name: str, of_setting: list[dict[str, Any]] = of_setting) -> float:
            return statistics.median(row[name] for row in of_setting)

        ratios = [row["ratio_to_dense_pass"] for row in of_setting]
        spread = f" ({min(ratios):.2f}–{max(ratios):.2f})" if len(ratios) > 1 else ""
        gib = f"{median('peak_host_gib'):.2f}" + (f", GPU {gpu:.2f}" if (gpu := median("peak_gpu_gib")) else "")
        table.add_row(
            f"{first['model']}, {first['num_layers']} layer{'s' * (first['num_layers'] > 1)}, "
            f"{first['samples']}×{first['seq_len']}, {first['ratio']:.0%}, {first['recovery']}",
            f"{median('elapsed_s'):.1f}",
            f"{median('ratio_to_dense_pass'):.2f}{spread}",
            f"{median('times_floor'):.2f}",
            f"{median('tokens_per_s'):.0f}",
            f"{median('layers_per_s'):.2f}",
            f"{median('parameters_per_s') / 1e6:.1f}",
            gib,
        )
    return table
