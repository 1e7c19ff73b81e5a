"""`slimllm latency`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimllm.cli.options import OUT, Quiet, TrustRemoteCode, app
from slimllm.cli.terminal import console, errors


@app.command("latency")
def latency_command(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="Folders, GGUF files or hub ids; the others are compared with the first."),
    ],
    batch_size: Annotated[list[int] | None, typer.Option(help="Prompts per batch; may be given again. Default: 1.")] = None,
    prompt: Annotated[
        list[int] | None, typer.Option(help="Tokens per prompt; may be given again. Default: 128 and 512.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated for each prompt, at least 2.")] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds; in each, all models are measured in turn.")] = 5,
    dtype: Annotated[
        str | None, typer.Option(help="dtype to compute in. Default: float32 on CPU, the checkpoint's on GPU.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, … Default: a GPU if there is one.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    out: Annotated[Path | None, typer.Option(*OUT, help="A new file for all results, as JSON.")] = None,
    quiet: Quiet = False,
) -> None:
    """Time the generation of models, dense or pruned, in turn: the pass of the prompt, and decoding.

    All models are in memory at once, each in its own process.
    """
    from slimllm.checkpoints.destination import check_new_file
    from slimllm.evaluation.latency import measure_latency
    from slimllm.evaluation.latency.display import about_speeds, latency_progress, model_table, speed_table

    check_new_file(out)
    with latency_progress(errors, quiet) as progress:
        found = measure_latency(
            models,
            batch_sizes=batch_size or [1],
            prompts=prompt or [128, 512],
            new_tokens=new_tokens,
            rounds=rounds,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if not quiet:
        console.print(model_table(found))
        console.print(speed_table(found))
        console.print(about_speeds(found), style="dim", highlight=False)
    if out is not None:
        found.write(out)
