"""`slimllm export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slimllm.cli.methods import MethodCommand, chosen_methods
from slimllm.cli.options import OUT, Plugin, Quiet, app
from slimllm.cli.terminal import console


@app.command("export", cls=MethodCommand)
def export_command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face folder, pruned or not, or a hub id.")],
    to: Annotated[
        str,
        typer.Option(help="stock: transformers' own, for alike layers. padded: any layers, no faster. gguf: llama.cpp."),
    ],
    out: Annotated[Path, typer.Option(*OUT, help="The folder to create; for gguf the file, NAME.gguf.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing model.")] = False,
    plugin: Plugin = None,
    quiet: Quiet = False,
) -> None:
    """Write a model in a format that more programs load; refuse if anything would be lost."""
    from slimllm.cli.display import PruneDisplay
    from slimllm.export.api import export

    exporter: Any = chosen_methods(context, exporter=to)["exporter"]
    with PruneDisplay(console, quiet) as display:
        name = export(model, out, exporter, overwrite=overwrite, progress=display.progress)
    if not quiet:
        console.print(f"{out} is written, with the architecture {name}.", highlight=False)
