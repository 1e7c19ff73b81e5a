"""`slimllm prune` and `slimllm plan`."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from slimllm.cli.methods import MethodCommand, with_methods
from slimllm.cli.options import OUT, RATIO, REMOVED, Model, Plugin, Quiet, app, fraction, write_page_unasked
from slimllm.cli.settings import with_settings
from slimllm.cli.terminal import console, errors
from slimllm.config import PruneConfig
from slimllm.errors import InputError, LostRankError, OutputError
from slimllm.runtime.interrupts import SafeStop
from slimllm.runtime.progress import Progress


@app.command("prune", cls=MethodCommand)
@with_settings(PruneConfig, program="--for")
def prune_command(
    context: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Option(*OUT, help="The folder to create.")],
    ratio: Annotated[
        list[float],
        typer.Option(
            *RATIO,
            parser=fraction,
            help="Fraction of the decoder layers' parameters to remove. Several: OUT/0.2, OUT/0.35, … in one run.",
        ),
    ],
    uniform: Annotated[bool, typer.Option("--uniform", help="Short for --allocation uniform: all layers alike.")] = False,
    plugin: Plugin = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model in the output folder.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the interrupted run for this folder, if there is one.")
    ] = False,
    page: Annotated[bool, typer.Option(help="Write a page about the result, report.html, into its folder.")] = True,
    quiet: Quiet = False,
    **settings: Any,
) -> None:
    """Prune a model and write the result as a Hugging Face folder.

    Under torchrun (torchrun --nproc-per-node 4 -m slimllm prune …) the processes share the calibration windows.
    """
    if uniform:
        if (given := settings["allocation"]) not in (None, "uniform"):
            raise InputError(f"--uniform is --allocation uniform, but --allocation {given} was given; leave one out.")
        settings["allocation"] = "uniform"
    if not os.environ.get("WORLD_SIZE"):  # wrong settings are refused before torch is imported; ranks check them together
        PruneConfig(ratio=ratio[0], **with_methods(context, settings))

    from slimllm.checkpoints.opening import open_checkpoint
    from slimllm.checkpoints.writer import can_resume
    from slimllm.cli.display import PruneDisplay
    from slimllm.export.api import check_vocabulary
    from slimllm.pruning.api import prune, prune_ratios
    from slimllm.runtime.distributed import Ranks, launched

    results = [out] if len(ratio) == 1 else [out / str(one) for one in ratio]
    command = shlex.join(["slimllm", *(argument for argument in sys.argv[1:] if argument != "--resume")])
    with launched(settings["device"]) as group:
        ranks = Ranks(group)
        with ranks.together():
            config = PruneConfig(ratio=ratio[0], **with_methods(context, settings))
            if config.program == "llama.cpp":
                check_vocabulary(open_checkpoint(model))
        tell = errors.print if ranks.first else _say_nothing
        stop = SafeStop(lambda sentence: tell(sentence, style="bold red"), ranks)

        def progress(event: Progress) -> None:
            display.progress(event)
            stop.progress(event)

        try:
            with PruneDisplay(console, quiet or not ranks.first) as display:
                options: Any = {"overwrite": overwrite, "resume": resume, "progress": progress}
                options |= {"command": command, "group": group}
                if len(ratio) == 1:
                    reports = [prune(model, out, config, **options)]
                else:
                    reports = prune_ratios(model, out, config, ratio, **options)
        except SystemExit:
            left = "the same command with --resume continues from here"
            tell(f"Interrupted; {left if any(map(can_resume, results)) else REMOVED}.", style="bold red", highlight=False)
            raise
        except (OutputError, LostRankError) as error:
            if any(map(can_resume, results)):
                raise type(error)(f"{error} The same command with --resume continues from here.") from error
            raise
        for report in reports if ranks.first and not quiet else []:
            display.summary(report)
    failures = []
    for report in reports if ranks.first and config.program == "llama.cpp" else []:
        try:
            _write_gguf(folder := Path(str(report.out)), quiet)
        except InputError as error:
            again = f"slimllm export {folder} --to gguf --out {folder}/model.gguf"
            failures.append(f"{error} {folder} itself is complete; this writes its GGUF file: {again}")
    for report in reports if ranks.first and page else []:  # the other ranks do not wait for it
        write_page_unasked(Path(str(report.out)), quiet)
    if failures:
        raise OutputError(" ".join(failures))


@app.command("plan", cls=MethodCommand)
@with_settings(PruneConfig, program="--for")
def plan_command(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, a GGUF file, a hub id, or the name of a shape: llama-33b, …")
    ],
    ratio: Annotated[
        float, typer.Option(*RATIO, parser=fraction, help="Fraction of the decoder layers' parameters to remove.")
    ] = 0.2,
    plugin: Plugin = None,
    ranks: Annotated[int, typer.Option(help="Processes that share the windows, each on a machine like this one.")] = 1,
    **settings: Any,
) -> None:
    """Estimate what a run would take, from config.json alone: memory by part, disk, time, and how it would fit a budget."""
    device = settings["device"]
    settings["device"] = None if device == "cuda" else device  # perhaps of another machine
    config = PruneConfig(ratio=ratio, **with_methods(context, settings))

    from slimllm.cli.display import print_forecast
    from slimllm.experiments.bench.forecast import forecast

    print_forecast(console, forecast(model, config, ranks, for_gpu=device == "cuda"))


def _write_gguf(folder: Path, quiet: bool) -> None:
    """Write a result as model.gguf in its folder."""
    from slimllm.checkpoints.destination import adopt, is_ours
    from slimllm.export.api import export

    file = folder / "model.gguf"
    architecture = export(folder, file, "gguf", overwrite=is_ours(folder, file.name))
    adopt(folder, file.name)
    if not quiet:
        console.print(
            f"        {file}, for llama.cpp, with the architecture {architecture}", highlight=False, soft_wrap=True
        )


def _say_nothing(*words: object, **style: object) -> None:
    """Print nothing; used on all ranks except the first."""
