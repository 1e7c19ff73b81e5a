"""`slimllm bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimllm.cli.methods import MethodCommand, rows_with_options
from slimllm.cli.options import OUT, RATIO, Plugin, Preset, app, fraction
from slimllm.cli.terminal import console
from slimllm.presets import DEFAULT


@app.command("bench", cls=MethodCommand)
def bench_command(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Folders, GGUF files, hub ids, or names of shapes (random weights): llama-7b, llama-33b, …",
        ),
    ] = None,
    layers: Annotated[list[int] | None, typer.Option(help="Number of layers, from the first. Default: all.")] = None,
    ratio: Annotated[
        list[float] | None, typer.Option(*RATIO, parser=fraction, help="Fraction of the layers' parameters. Default: 0.2.")
    ] = None,
    recovery: Annotated[list[str] | None, typer.Option(help="affine, lstsq, bias or none. Default: the preset's.")] = None,
    criterion: Annotated[str | None, typer.Option(help="As for prune. Default: the preset's.")] = None,
    allocation: Annotated[str | None, typer.Option(help="As for prune. Default: the preset's.")] = None,
    plugin: Plugin = None,
    samples: Annotated[list[int] | None, typer.Option(help="Calibration windows. Default: 32.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 128,
    preset: Preset = DEFAULT,
    rounds: Annotated[int, typer.Option(help="Runs of each setting; the table shows medians.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, … Default: a GPU if there is one.")] = None,
    compute_dtype: Annotated[str | None, typer.Option(help="dtype of the forward passes.")] = None,
    on_disk: Annotated[bool, typer.Option("--on-disk", help="Write random weights to disk first, and read them.")] = False,
    workdir: Annotated[Path | None, typer.Option(help="Folder for temporary models.")] = None,
    out: Annotated[Path, typer.Option(*OUT, help="File of results; rows are appended.")] = Path("slimllm-bench.jsonl"),
    plot: Annotated[
        Path | None, typer.Option(help="Plot all rows of --out to this .png or .svg; MODEL may be left out.")
    ] = None,
) -> None:
    """Measure pruning throughput: seconds by stage, memory, and the time divided by its lower bound (floor).

    Options that are given more than once (--samples 8 --samples 32) are measured in all combinations.
    """
    from slimllm.experiments.bench.display import run_bench

    common = {"preset": preset, "criterion": criterion, "allocation": allocation}
    names: list[str | None] = [*recovery] if recovery else [None]
    rows = rows_with_options(context, {str(name): {**common, "recovery": name} for name in names})

    run_bench(
        console,
        models or [],
        layers=layers or [None],
        ratio=ratio or [0.2],
        methods=list(rows.values()),
        plugins=tuple(plugin or ()),
        samples=samples or [32],
        seq_len=seq_len,
        rounds=rounds,
        device=device,
        compute_dtype=compute_dtype,
        on_disk=on_disk,
        workdir=workdir,
        out=out,
        plot=plot,
    )
