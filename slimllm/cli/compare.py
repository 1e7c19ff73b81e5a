"""`slimllm compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimllm.cli.busy import watch_for_other_work
from slimllm.cli.methods import MethodCommand, rows_with_options
from slimllm.cli.options import (
    OUT,
    RATIO,
    Bos,
    CalibrationText,
    EvalLen,
    EvalText,
    MaxWindows,
    Model,
    Plugin,
    Quiet,
    Samples,
    Seed,
    app,
    fraction,
)
from slimllm.cli.terminal import console


@app.command("compare", cls=MethodCommand)
def compare_command(
    context: typer.Context,
    model: Model,
    ratio: Annotated[
        list[float] | None,
        typer.Option(*RATIO, parser=fraction, help="Several give a table of each. Default: 0.2 and 0.5."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="best, slimllm, flap, …, or one of yours, as mine+lstsq; may be given again. Default: all."),
    ] = None,
    plugin: Plugin = None,
    text: EvalText = None,
    eval_len: EvalLen = 128,
    max_windows: MaxWindows = 64,
    bos: Bos = "auto",
    calibration: CalibrationText = None,
    samples: Samples = 32,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 128,
    seed: Seed = 0,
    head_unit: Annotated[str, typer.Option(help="kv-group, or query.")] = "kv-group",
    compute_dtype: Annotated[str | None, typer.Option(help="dtype of the forward passes.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, … Default: a GPU if there is one.")] = None,
    workdir: Annotated[Path | None, typer.Option(help="Where the model at work is written, and deleted again.")] = None,
    out: Annotated[Path | None, typer.Option(*OUT, help="A new file for the lines, as JSONL.")] = None,
    quiet: Quiet = False,
) -> None:
    """Prune a model by several methods at the same ratios, and print the perplexity of each; no model is kept."""
    from slimllm.cli.compare_display import run_compare
    from slimllm.config import PruneConfig
    from slimllm.experiments.methods import METHODS, rows_of

    config = PruneConfig(
        ratio=0.5,
        calibration=calibration,
        bos=bos,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        head_unit=head_unit,
        compute_dtype=compute_dtype,
        device=device,
    )
    rows = rows_with_options(context, rows_of(method or tuple(METHODS)))
    with watch_for_other_work(quiet, device):
        run_compare(
            console, model, ratio or [0.2, 0.5], config, rows, text, eval_len, max_windows or None, workdir, out, quiet
        )
