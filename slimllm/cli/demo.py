"""`slimllm demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimllm.cli.options import OUT, RATIO, app, fraction
from slimllm.cli.terminal import console


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(*OUT, help="The folder to create.")] = Path("slimllm-demo"),
    ratio: Annotated[
        float, typer.Option(*RATIO, parser=fraction, help="Fraction of the decoder layers' parameters to remove.")
    ] = 0.2,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model in the output folder.")] = False,
) -> None:
    """Prune a small real model and compare it with the dense one."""
    from slimllm.cli.demo_display import run_demo

    run_demo(out, ratio, overwrite, console)
