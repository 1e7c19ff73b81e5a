"""The command line: arguments to the same functions that Python users call. An error of the input exits with 2."""

from __future__ import annotations

import importlib.metadata
import os
from signal import signal
from typing import Annotated

import typer

from slimllm.cli import prune, export, measure, finetune, page  # isort: skip
from slimllm.cli.options import REMOVED, app, console, errors
from slimllm.errors import InputError, OtherRankError
from slimllm.interrupts import SIGNALS, leave
from slimllm.parallel import end

__all__ = ["app", "export", "finetune", "main", "measure", "page", "prune"]


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(importlib.metadata.version("slimllm-engine"), highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Structured pruning of large language models (SlimLLM)."""


def _interrupted(number: int, frame: object) -> None:
    if os.environ.get("RANK", "0") == "0":
        errors.print(f"Interrupted; {REMOVED}.", style="bold red")
    leave(number)


def main() -> None:
    """Entry point of the command `slimllm`."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for number in SIGNALS:
        signal(number, _interrupted)
    try:
        from transformers.utils import logging

        logging.disable_progress_bar()
        app()
    except SystemExit as leaving:
        code = leaving.code
    except OtherRankError:
        code = 2
    except InputError as error:
        errors.print(f"Error: {error}", style="bold red", highlight=False, soft_wrap=True, markup=False)
        code = 2
    end(code)
