"""`slimllm prune` and `slimllm plan`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from slimllm.cli.busy import watch_for_other_work
from slimllm.cli.methods import MethodCommand, chosen_methods
from slimllm.cli.options import (
    OUT,
    RATIO,
    REMOVED,
    AllocationName,
    Bos,
    Criterion,
    HeadsMultipleOf,
    Model,
    Plugin,
    Preset,
    Quiet,
    Recovery,
    Samples,
    Seed,
    TokenWeights,
    app,
    fraction,
    write_page_unasked,
)
from slimllm.cli.terminal import console, errors
from slimllm.errors import InputError, LostRankError, OutputError
from slimllm.runtime.distributed import Ranks, launched
from slimllm.runtime.interrupts import SafeStop


@app.command("prune", cls=MethodCommand)
def prune_command(
    context: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Option(*OUT, help="The folder to make.")],
    ratio: Annotated[
        list[float],
        typer.Option(
            *RATIO,
            parser=fraction,
            help="Fraction of the decoder layers' parameters to remove. Several: OUT/0.2, OUT/0.35, … in one go.",
        ),
    ],
    preset: Preset = "default",
    criterion: Criterion = None,
    allocation: AllocationName = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="Short for --allocation uniform: all layers alike.")] = False,
    recovery: Recovery = None,
    token_weights: TokenWeights = None,
    plugin: Plugin = None,
    head_unit: Annotated[str, typer.Option(help="kv-group, or query: as many query heads from every group.")] = "kv-group",
    calibration: Annotated[
        str | None,
        typer.Option(
            help="A file (text, JSON lines, CSV, .gz) or a dataset NAME[:CONFIG[:SPLIT[:COLUMN]]]. Default: bundled text."
        ),
    ] = None,
    bos: Bos = "auto",
    samples: Samples = 32,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 128,
    seed: Seed = 0,
    batch_size: Annotated[int | None, typer.Option(help="Windows in a forward pass. Default: about 1024 tokens.")] = None,
    heads_multiple_of: HeadsMultipleOf = 1,
    round_to: Annotated[
        int | None, typer.Option(help="Widths are multiples of this. Default: up to 64, as the target allows.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16. Default: the checkpoint's.")] = None,
    compute_dtype: Annotated[
        str | None, typer.Option(help="dtype of the forward passes. Default: float32 on CPU, the checkpoint's on GPU.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, … Default: a GPU if there is one.")] = None,
    host_memory: Annotated[str | None, typer.Option(help="Budget, such as 16GiB: the run is done so that it fits.")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="The same, of the GPU.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model in the output folder.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run for this folder that was interrupted, if one was.")
    ] = False,
    page: Annotated[bool, typer.Option(help="Write a page about the result, report.html, into its folder.")] = True,
    quiet: Quiet = False,
) -> None:
    """Prune a model and write the result as a Hugging Face folder.

    Under torchrun (torchrun --nproc-per-node 4 -m slimllm prune …) the processes share the calibration windows.
    """
    from slimllm.checkpoints.writer import can_resume
    from slimllm.cli.display import PruneDisplay
    from slimllm.config import PruneConfig
    from slimllm.pruning.api import prune, prune_ratios

    if uniform:
        if allocation not in (None, "uniform"):
            raise InputError(f"--uniform is --allocation uniform, but --allocation {allocation} was given; leave one out.")
        allocation = "uniform"
    results = [out] if len(ratio) == 1 else [out / str(one) for one in ratio]
    command = shlex.join(["slimllm", *(argument for argument in sys.argv[1:] if argument != "--resume")])
    with launched(device) as group:
        ranks = Ranks(group)
        with ranks.together():
            methods: Any = chosen_methods(context, preset, criterion=criterion, allocation=allocation, recovery=recovery)
            config = PruneConfig(
                ratio=ratio[0],
                preset=preset,
                **methods,
                token_weights=token_weights,
                head_unit=head_unit,
                calibration=calibration,
                bos=bos,
                samples=samples,
                seq_len=seq_len,
                seed=seed,
                batch_size=batch_size,
                heads_multiple_of=heads_multiple_of,
                round_to=round_to,
                dtype=dtype,
                compute_dtype=compute_dtype,
                device=device,
                host_memory=host_memory,
                gpu_memory=gpu_memory,
            )
        tell = errors.print if ranks.first else _say_nothing
        stop = SafeStop(lambda sentence: tell(sentence, style="bold red"), ranks)

        def progress(stage: str, index: int, num_layers: int, layer: dict[str, Any] | None) -> None:
            display.progress(stage, index, num_layers, layer)
            stop.progress(stage, index, num_layers, layer)

        try:
            several = group is not None  # to each of them the others are other work
            with watch_for_other_work(quiet or several, device), PruneDisplay(console, quiet or not ranks.first) as display:
                settings: Any = {"overwrite": overwrite, "resume": resume, "progress": progress, "notice": display.notice}
                settings |= {"command": command, "group": group}
                if len(ratio) == 1:
                    reports = [prune(model, out, config, **settings)]
                else:
                    reports = prune_ratios(model, out, config, ratio, **settings)
        except SystemExit:
            left = "the same command with --resume goes on from here"
            tell(f"Interrupted; {left if any(map(can_resume, results)) else REMOVED}.", style="bold red", highlight=False)
            raise
        except (OutputError, LostRankError) as error:
            if any(map(can_resume, results)):
                raise type(error)(f"{error} The same command with --resume goes on from here.") from error
            raise
        for report in reports if ranks.first and not quiet else []:
            display.summary(report)
    for report in reports if ranks.first and page else []:  # the other ranks do not wait for it
        write_page_unasked(Path(str(report.out)), quiet)


@app.command("plan", cls=MethodCommand)
def plan_command(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, a GGUF file, a hub id, or the name of a shape: llama-33b, …")
    ],
    ratio: Annotated[
        float, typer.Option(*RATIO, parser=fraction, help="Fraction of the decoder layers' parameters to remove.")
    ] = 0.2,
    preset: Preset = "default",
    criterion: Criterion = None,
    allocation: AllocationName = None,
    recovery: Recovery = None,
    plugin: Plugin = None,
    heads_multiple_of: HeadsMultipleOf = 1,
    samples: Samples = 32,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 128,
    dtype: Annotated[str | None, typer.Option(help="dtype of the written weights.")] = None,
    compute_dtype: Annotated[str | None, typer.Option(help="dtype of the forward passes.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, or cuda: here or on another machine. Default: a GPU if there is one.")
    ] = None,
    host_memory: Annotated[str | None, typer.Option(help="Budget, such as 16GiB.")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="The same, of the GPU.")] = None,
    ranks: Annotated[int, typer.Option(help="Processes that share the windows, each on a machine like this one.")] = 1,
) -> None:
    """What a run would take, from config.json alone: memory by its parts, disk, time, and how it would fit a budget."""
    from slimllm.cli.display import print_forecast
    from slimllm.config import PruneConfig
    from slimllm.experiments.bench.forecast import forecast

    methods: Any = chosen_methods(context, preset, criterion=criterion, allocation=allocation, recovery=recovery)
    config = PruneConfig(
        ratio=ratio,
        preset=preset,
        **methods,
        heads_multiple_of=heads_multiple_of,
        samples=samples,
        seq_len=seq_len,
        dtype=dtype,
        compute_dtype=compute_dtype,
        device=None if device == "cuda" else device,
        host_memory=host_memory,
        gpu_memory=gpu_memory,
    )
    print_forecast(console, forecast(model, config, ranks, for_gpu=device == "cuda"))


def _say_nothing(*words: object, **style: object) -> None:
    """In place of printing, on all ranks but the first."""
