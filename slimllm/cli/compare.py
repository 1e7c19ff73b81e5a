"""`slimllm compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slimllm.cli.methods import MethodCommand, rows_with_options
from slimllm.cli.options import COMMON, OUT, RATIO, EvalLen, EvalText, MaxWindows, Model, Plugin, Quiet, app, fraction
from slimllm.cli.settings import with_settings
from slimllm.cli.terminal import console
from slimllm.config import PruneConfig


@app.command("compare", cls=MethodCommand)
@with_settings(PruneConfig, COMMON)
def compare_command(
    context: typer.Context,
    model: Model,
    ratio: Annotated[
        list[float] | None,
        typer.Option(*RATIO, parser=fraction, help="As for prune; may be given again. Default: 0.2 and 0.5."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="best, slimllm, flap, …, or your own, such as mine+affine; may be given again. Default: all."),
    ] = None,
    plugin: Plugin = None,
    text: EvalText = None,
    eval_len: EvalLen = 128,
    max_windows: MaxWindows = 64,
    workdir: Annotated[Path | None, typer.Option(help="Folder for the temporary model.")] = None,
    out: Annotated[Path | None, typer.Option(*OUT, help="A new file for the results, as JSON lines.")] = None,
    quiet: Quiet = False,
    **settings: Any,
) -> None:
    """Prune a model with several methods at the same ratios, and print the perplexity of each; no model is kept."""
    from slimllm.cli.compare_display import run_compare
    from slimllm.experiments.methods import METHODS, rows_of

    config = PruneConfig(ratio=0.5, **settings)
    rows = rows_with_options(context, rows_of(method or tuple(METHODS)))
    run_compare(console, model, ratio or [0.2, 0.5], config, rows, text, eval_len, max_windows or None, workdir, out, quiet)
