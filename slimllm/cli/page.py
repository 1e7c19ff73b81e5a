"""`slimllm report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimllm.checkpoint import first_line
from slimllm.cli.options import Quiet, app, console, errors


def write_page_unasked(folder: Path, quiet: bool) -> None:
    """The page of a model that has just been written; where that fails it is said, and the model is as good as before."""
    from slimllm.page import write_page_of

    try:
        page = write_page_of(folder)
    except Exception as error:
        errors.print(
            f"The page about {folder} could not be written ({type(error).__name__}: {first_line(error)}) "
            f"slimllm report {folder} tries again.",
            style="bold red", highlight=False, soft_wrap=True, markup=False,
        )  # fmt: skip
        return
    if not quiet:
        console.print(f"page    {page}", highlight=False, soft_wrap=True)


@app.command("report")
def report_command(
    folder: Annotated[Path, typer.Argument(help="What slimllm prune or finetune has written.")],
    dense: Annotated[
        str | None, typer.Option(help="The model before, to show what it writes, too: a folder, a GGUF file or a hub id.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="What the sample goes on with.")] = "The old house at the end of the street",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, … Default: a GPU if there is one.")] = None,
    sample: Annotated[bool, typer.Option(help="Load the model and show what it writes.")] = True,
    quiet: Quiet = False,
) -> None:
    """Write a page about a pruned model, report.html in its folder, and its pictures as PNGs in report/."""
    from slimllm.page import make_sample, write_page
    from slimllm.report import PruneReport

    PruneReport.read(folder)  # or it is refused before a model is loaded
    page = write_page(folder, make_sample(folder, dense, prompt, device) if sample else None)
    if not quiet:
        console.print(f"The page is {page}.", highlight=False, soft_wrap=True)
