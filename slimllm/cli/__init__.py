"""The command line: commands call the same functions as Python users. Input errors exit with code 2."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from signal import signal
from typing import Annotated

import typer

from slimllm.cli import prune, export, eval, compare, sweep, latency, finetune, page, demo, bench, doctor  # noqa: F401, isort: skip
from slimllm.cli.options import REMOVED, app
from slimllm.cli.terminal import console, errors, lost, open_closed_streams
from slimllm.errors import InputError, OtherRankError, exhausted
from slimllm.runtime.interrupts import SIGNALS, leave

__all__ = ["app", "main"]


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
    """Structured pruning of large language models."""


def _interrupted(number: int, frame: object) -> None:
    if os.environ.get("RANK", "0") == "0":
        errors.print(f"Interrupted; {REMOVED}.", style="bold red")
    leave(number)


# Advice on how to use less memory, by command.
_LESS_MEMORY = {
    "prune": "give a budget with --host-memory or --gpu-memory, take --preset slimllm, or lower --samples, --seq-len or "
    "--batch-size",
    "compare": "lower --samples, --seq-len or --eval-len",
    "sweep": "lower --samples, --seq-len, --eval-len or --prompt",
    "eval": "lower --batch-size or --seq-len, or give --dtype bfloat16",
    "latency": "lower --batch-size or --prompt, or give fewer models",
    "finetune": "lower --micro-batch or --seq-len",
    "report": "give --no-sample",
    "bench": "lower --samples, --seq-len or --layers",
}


def _say(sentence: str) -> None:
    errors.print(f"Error: {sentence}", style="bold red", highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point of the command `slimllm`."""
    open_closed_streams()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for number in SIGNALS:
        signal(number, _interrupted)
    try:
        app()
    except SystemExit as leaving:
        code = leaving.code
    except OtherRankError:
        code = 2
    except InputError as error:
        _say(str(error))
        code = 2
    except (MemoryError, RuntimeError, OSError) as error:
        memory = exhausted(error)
        if memory is not None:
            _say(f"There is not enough {memory} memory; {_LESS_MEMORY.get(sys.argv[1], 'free some')}.")
        elif isinstance(error, OSError):
            _say(f"Reading or writing failed: {error}.")
        else:
            raise
        code = 2
    if (reason := lost()) is not None:
        done = "" if code else "; everything else is done"
        _say(f"Printed output was lost ({reason.strerror}){done}.")
        code = code or 2
    if "torch" in sys.modules:
        from slimllm.runtime.distributed import end

        end(code)
    sys.exit(code)
