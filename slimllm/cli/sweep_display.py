"""Output of `slimllm sweep`: a line for each point when it is done, the table, and the picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from slimllm.calibration import about_bos, window_bos
from slimllm.checkpoints.opening import open_checkpoint
from slimllm.checks import parse_device
from slimllm.cli.display import PruneDisplay
from slimllm.config import PruneConfig
from slimllm.errors import InputError, OutputError
from slimllm.evaluation.perplexity import evaluation_tokens
from slimllm.experiments.bench.run import machine
from slimllm.experiments.methods import config_of, identity_of
from slimllm.experiments.samples import with_samples
from slimllm.experiments.sweep import Swept, on_front, sweep
from slimllm.pruning.report import versions

POINTS, PICTURE = "sweep.jsonl", "sweep.png"


def run_sweep(
    console: Console,
    model: str,
    ratios: list[float],
    presets: dict[str, dict[str, Any]],
    config: PruneConfig,
    text: str | None,
    eval_len: int,
    max_windows: int | None,
    prompt: int,
    new_tokens: int,
    rounds: int,
    out: Path,
    keep: bool,
    workdir: Path | None,
    resume: bool,
    quiet: bool,
) -> None:
    """Sweep into a folder, and print the table; arguments as on the command line.

    Raises:
        ValueError: (as InputError) as `sweep`, or the folder has points already, and `resume` is not set or they have
            other settings.
    """
    device = parse_device(config.device)
    checkpoint = open_checkpoint(model)
    tokenizer, config = checkpoint.tokenizer(), with_samples(config, presets.values(), checkpoint)
    bos_token_id = window_bos(tokenizer, config.bos)
    settings = {
        "model": model,
        "text": text or "bundled",
        "eval_len": eval_len,
        "max_windows": max_windows,
        "bos": config.bos,
        "bos_token_id": bos_token_id,
        "prompt": prompt,
        "new_tokens": new_tokens,
        "calibration": config.to_dict()["calibration"],
        "samples": config.samples,
        "seq_len": config.seq_len,
        "seed": config.seed,
        "head_unit": config.head_unit,
        "compute_dtype": config.compute_dtype,
        "rounds": rounds,
        "device": machine(str(device)),
        "threads": torch.get_num_threads(),
        "slimllm": versions()["slimllm"],
    }
    methods = {name: identity_of(config_of(config, row, config.ratio)) for name, row in presets.items()}
    file = out / POINTS
    others = [path.name for path in out.iterdir() if path.name not in presets] if out.is_dir() else []
    if others and not file.exists():  # a sweep without a point yet may have kept models of its presets
        raise InputError(f"The folder {out} is not empty ({others[0]}) and holds no sweep; give another one.")
    done = _read(file, settings, methods, resume)
    with PruneDisplay(console, quiet) as display, _folder(out):
        tokens = evaluation_tokens(tokenizer, text, eval_len, max_windows, config.bos)

        def on_point(point: Swept) -> None:
            try:
                with file.open("a", encoding="utf-8") as lines:
                    of_point = {**settings, "methods": methods.get(point.preset)}
                    lines.write(json.dumps({**dataclasses.asdict(point), **of_point}) + "\n")
            except OSError as error:
                raise OutputError(f"A point could not be written to {file}: {error.strerror}.") from error
            about = "dense" if point.preset == "dense" else f"{point.preset} at {point.ratio:g}"
            display.say(f"{about}: perplexity {point.perplexity:.2f}, decoding x {point.decode_speedup:.2f}")

        points = sweep(
            model,
            ratios,
            config,
            tokens,
            presets=presets,
            seq_len=eval_len,
            max_windows=max_windows,
            bos_token_id=bos_token_id,
            prompt=prompt,
            new_tokens=new_tokens,
            rounds=rounds,
            keep=out if keep else None,
            workdir=workdir,
            done=done,
            progress=display.progress,
            on_point=on_point,
        )
    draw(points, out / PICTURE)
    if quiet:
        return
    console.print(sweep_table(points))
    console.print(
        f"Perplexity in windows of {eval_len} tokens, {about_bos(bos_token_id)}. *: no other point has a lower one "
        "without more parameters. Speeds are relative to the dense model, measured in turn; s: seconds of pruning. "
        f"All results and the picture: {out}",
        style="dim",
        highlight=False,
    )


@contextmanager
def _folder(out: Path) -> Iterator[None]:
    """Create the folder; a new one is removed again if nothing is written to it."""
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The folder {out} cannot be made: {error.strerror}.") from None
    try:
        yield
    finally:
        if made:
            with suppress(OSError):  # fails if it is not empty
                out.rmdir()


def _read(file: Path, settings: dict[str, Any], methods: dict[str, Any], resume: bool) -> list[Swept]:
    if not file.exists():
        return []
    if not resume:
        raise InputError(f"{file.parent} holds a sweep already; add --resume to continue it, or give another folder.")
    points = []
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):  # an incomplete last line
        with file.open("r+b") as cut:
            cut.truncate(whole)
    for number, line in enumerate(content[:whole].decode(errors="replace").splitlines(), 1):
        try:
            row = json.loads(line)
            point = Swept(**{field.name: row.pop(field.name) for field in dataclasses.fields(Swept)})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InputError(f"Line {number} of {file} is not a point of a sweep; give another folder.") from None
        for name, value in {**settings, "methods": methods.get(point.preset, row.get("methods"))}.items():
            if row.get(name) != value:
                if name == "methods":
                    raise InputError(
                        f"Another method was called {point.preset} in the sweep in {file.parent}, or its code or options "
                        "have changed; give another folder."
                    )
                raise InputError(
                    f"The sweep in {file.parent} had another {name} ({row.get(name)}) than this one ({value}); "
                    "give the same, or another folder."
                )
        points.append(point)
    return points


def sweep_table(points: list[Swept]) -> Table:
    """Return a table with a line for each point."""
    table = Table(box=None, padding=(0, 1), header_style="bold")
    titles = ("preset", "ratio", "M par.", "perplexity", "log incr.", "prefill", "decoding", "s", "")
    for title in titles:
        table.add_column(title, justify="left" if title == "preset" else "right", no_wrap=True)
    front = on_front(points)
    for point in points:
        millions = point.parameters / 1e6
        cells = [
            f"{millions:,.1f}" if millions >= 10 else f"{millions:.3g}",
            f"{point.perplexity:.2f}",
            f"{point.log_increase:.3f}",
        ]
        cells += [f"{point.prefill_speedup:.2f} ×", f"{point.decode_speedup:.2f} ×", f"{point.prune_s:.1f}"]
        table.add_row(point.preset, f"{point.ratio:g}", *cells, "*" if (point.preset, point.ratio) in front else "")
    return table


def draw(points: list[Swept], path: Path) -> None:
    """Draw perplexity over parameters and over measured speed, as a PNG."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    dense = next(point for point in points if point.preset == "dense")
    panels = (
        ("parameters, M", lambda point: point.parameters / 1e6),
        ("decoding speed relative to the dense model", lambda point: point.decode_speedup),
    )
    for column, (title, value) in enumerate(panels):
        axes = figure.add_subplot(1, 2, column + 1)
        for preset in dict.fromkeys(point.preset for point in points if point is not dense):
            line = [dense, *(point for point in points if point.preset == preset)]
            axes.plot([value(point) for point in line], [point.perplexity for point in line], marker="o", label=preset)
            for point in line[1:]:
                axes.annotate(f" {point.ratio:g}", (value(point), point.perplexity), fontsize=8)
        axes.plot(value(dense), dense.perplexity, marker="s", color="black", linestyle="none", label="dense")
        axes.set(xlabel=title, ylabel="perplexity", yscale="log")
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter(lambda value, position: f"{value:g}")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InputError(f"The picture {path} cannot be written: {error.strerror}.") from None
