"""`slimllm sweep`."""

from __future__ import annotations

from pathlib import Path
from signal import signal
from typing import Annotated, Any

import typer

from slimllm.cli.methods import MethodCommand, rows_with_options
from slimllm.cli.options import COMMON, OUT, RATIO, EvalLen, EvalText, MaxWindows, Model, Plugin, Quiet, app
from slimllm.cli.settings import with_settings
from slimllm.cli.terminal import console, errors
from slimllm.config import PruneConfig
from slimllm.presets import DEFAULT
from slimllm.runtime.interrupts import SIGNALS, leave


@app.command("sweep", cls=MethodCommand)
@with_settings(PruneConfig, COMMON)
def sweep_command(
    context: typer.Context,
    model: Model,
    ratio: Annotated[
        list[str] | None,
        typer.Option(*RATIO, help="FIRST:LAST:STEP, or a number; may be given again. Default: 0.1:0.6:0.1."),
    ] = None,
    preset: Annotated[
        list[str] | None, typer.Option(help="A preset, or a method as for compare; may be given again. Default: best.")
    ] = None,
    out: Annotated[Path, typer.Option(*OUT, help="Folder for the points and the picture.")] = Path("slimllm-sweep"),
    plugin: Plugin = None,
    text: EvalText = None,
    eval_len: EvalLen = 128,
    max_windows: MaxWindows = 64,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt in the speed measurement.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated in the speed measurement.")] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds of the speed measurement.")] = 5,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the models: OUT/PRESET/RATIO.")] = False,
    workdir: Annotated[Path | None, typer.Option(help="Folder for temporary models.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the sweep in that folder.")] = False,
    quiet: Quiet = False,
    **settings: Any,
) -> None:
    """Prune at many ratios: perplexity against parameters and against measured speed, as a table and a picture."""
    from slimllm.cli.sweep_display import run_sweep
    from slimllm.experiments.methods import rows_of
    from slimllm.experiments.sweep import parse_ratios

    for number in SIGNALS:  # completed points are kept
        signal(number, leave)
    ratios = parse_ratios(ratio or ["0.1:0.6:0.1"])
    config = PruneConfig(ratio=ratios[0], **settings)
    rows = rows_with_options(context, rows_of(preset or [DEFAULT]))
    try:
        run_sweep(
            console,
            model,
            ratios,
            rows,
            config,
            text,
            eval_len,
            max_windows or None,
            prompt,
            new_tokens,
            rounds,
            out,
            keep,
            workdir,
            resume,
            quiet,
        )
    except SystemExit:
        errors.print(f"Interrupted; --resume continues the sweep in {out}.", style="bold red", highlight=False)
        raise
