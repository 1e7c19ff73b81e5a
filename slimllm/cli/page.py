"""`slimllm report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimllm.cli.options import Quiet, TrustRemoteCode, app
from slimllm.cli.terminal import console


@app.command("report")
def report_command(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A folder written by slimllm prune, or by finetune from one.")
    ],
    dense: Annotated[
        str | None, typer.Option(help="The dense model, to show its sample, too: a folder, a GGUF file or a hub id.")
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="The prompt that the sample continues.")
    ] = "The old house at the end of the street",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, … Default: a GPU if there is one.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    sample: Annotated[bool, typer.Option(help="Load the model and show a sample of its text.")] = True,
    quiet: Quiet = False,
) -> None:
    """Write a page about a pruned model, report.html in its folder, and its pictures as PNGs in report/."""
    from slimllm.pruning.report import PruneReport
    from slimllm.report import make_sample, write_page

    PruneReport.read(folder)  # raises before a model is loaded
    page = write_page(folder, make_sample(folder, dense, prompt, device, trust_remote_code) if sample else None)
    if not quiet:
        console.print(f"The page is {page}.", highlight=False, soft_wrap=True)
