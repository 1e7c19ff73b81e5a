"""Shared parts of the commands: the application, common options, and the page of a result."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated

import typer

from slimllm.cli.terminal import console, errors

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)

# Names of these two options, including those of other programs.
OUT = ("--out", "--output", "-o")
RATIO = ("--ratio", "--sparsity")

# Settings that all methods of a comparison or a sweep have in common.
COMMON = ("calibration", "bos", "samples", "seq_len", "seed", "head_unit", "compute_dtype", "device")


def fraction(text: str | float) -> float:
    """Parse a fraction from the command line, 0.3 or 30%; a default, which is a number, is returned unchanged."""
    try:
        text = str(text)
        return float(Decimal(text[:-1]) / 100) if text.endswith("%") else float(text)
    except (ValueError, InvalidOperation):
        raise typer.BadParameter(f"{text!r} is not a number; give a fraction such as 0.3, or 30%.") from None


REMOVED = "partial output is deleted"

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face folder, a GGUF file or a hub id.")]
Preset = Annotated[
    str,
    typer.Option(
        help="best (the most accurate), slimllm (the paper's method: faster, less memory) or paper (as published)."
    ),
]
Plugin = Annotated[
    list[str] | None, typer.Option(help="A module, or a file that ends in .py, with methods of your own; it is imported.")
]
EvalText = Annotated[
    str | None,
    typer.Option(
        help="Evaluation text: a file (text, JSON lines, CSV, .gz), a dataset, wikitext2 or ptb. Default: bundled."
    ),
]
Bos = Annotated[
    str, typer.Option(help="BOS before every window. auto: where the tokenizer adds one to a text; always; or never.")
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
EvalLen = Annotated[int, typer.Option(help="Tokens per window of that text.")]
MaxWindows = Annotated[int, typer.Option(help="Windows of that text; 0: all.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but warnings and errors.")]


def write_page_unasked(folder: Path, quiet: bool) -> None:
    """Write the page of a model that has just been written; a failure is printed, and does not affect the model."""
    from slimllm.errors import first_line
    from slimllm.report import write_page_of

    if not quiet:
        console.print("Writing the page about it …", style="dim")
    try:
        page = write_page_of(folder)
    except Exception as error:
        errors.print(
            f"The page about {folder} could not be written ({type(error).__name__}: {first_line(error)}) "
            f"Run slimllm report {folder} to try again.",
            style="bold red",
            highlight=False,
            soft_wrap=True,
        )
        return
    if not quiet:
        console.print(f"page    {page}", highlight=False, soft_wrap=True)
