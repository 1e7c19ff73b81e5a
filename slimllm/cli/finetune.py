"""`slimllm finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimllm.cli.busy import watch_for_other_work
from slimllm.cli.options import OUT, REMOVED, Quiet, TrustRemoteCode, app, write_page_unasked
from slimllm.cli.terminal import console, errors
from slimllm.finetuning.report import FinetuneReport
from slimllm.pruning.report import REPORT_NAME


@app.command("finetune")
def finetune_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face folder, such as slimllm prune writes.")],
    data: Annotated[
        Path,
        typer.Option(help="JSON lines, a JSON list or CSV: instruction, input, output as in Alpaca; or messages; or text."),
    ],
    out: Annotated[Path, typer.Option(*OUT, help="The folder to make.")],
    rank: Annotated[int, typer.Option(help="r of LoRA.")] = 4,
    alpha: Annotated[int, typer.Option(help="Updates are multiplied by alpha / rank.")] = 16,
    dropout: Annotated[float, typer.Option(help="LoRA's dropout.")] = 0.05,
    learning_rate: Annotated[float, typer.Option("--lr", help="The highest, after the warm-up; it falls to 0.")] = 1e-4,
    warmup: Annotated[float, typer.Option(help="The share of the steps in which it rises.")] = 0.05,
    epochs: Annotated[int, typer.Option(help="How often every example is seen.")] = 2,
    batch_size: Annotated[int, typer.Option(help="Examples of a step.")] = 16,
    micro_batch: Annotated[int, typer.Option(help="Examples in a forward pass; fewer take less memory.")] = 4,
    seq_len: Annotated[int, typer.Option(help="Tokens of an example at most.")] = 256,
    held_out: Annotated[int, typer.Option(help="Examples to measure on instead; a tenth of all at most.")] = 64,
    max_steps: Annotated[int | None, typer.Option(help="End after so many steps.")] = None,
    save_every: Annotated[
        int, typer.Option(help="Save the state, and measure the held-out loss, every so many steps.")
    ] = 20,
    seed: Annotated[int, typer.Option(help="Of everything that is random.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16, to compute in. Default: float32 on CPU, bfloat16 on GPU.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, … Default: a GPU if there is one.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model in the output folder.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the training that was interrupted.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Train a pruned model by LoRA, with the paper's settings, and write it, merged, in its own format.

    Interrupt it once to stop behind the present step, with its state on the disk.
    """
    from slimllm.checkpoints.writer import can_resume
    from slimllm.cli.display import PruneDisplay
    from slimllm.errors import OutputError
    from slimllm.finetuning import FinetuneConfig, finetune
    from slimllm.runtime.distributed import Ranks
    from slimllm.runtime.interrupts import SafeStop

    config = FinetuneConfig(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        learning_rate=learning_rate,
        warmup=warmup,
        epochs=epochs,
        batch_size=batch_size,
        micro_batch=micro_batch,
        seq_len=seq_len,
        held_out=held_out,
        max_steps=max_steps,
        save_every=save_every,
        seed=seed,
        dtype=dtype,
        device=device,
    )
    with watch_for_other_work(quiet, device), PruneDisplay(console, quiet) as display:
        stop = SafeStop(lambda sentence: errors.print(sentence.replace("layer", "step")), Ranks())

        def progress(stage: str, index: int, number: int, about: dict[str, float] | None) -> None:
            display.progress(stage, index, number, about)
            if stage == "train":
                stop.progress(stage, index, number, about)

        try:
            report = finetune(
                model,
                data,
                out,
                config,
                overwrite=overwrite,
                resume=resume,
                trust_remote_code=trust_remote_code,
                progress=progress,
                notice=display.notice,
            )
        except SystemExit:
            left = "the same command with --resume goes on from here"
            errors.print(f"Interrupted; {left if can_resume(out) else REMOVED}.", style="bold red", highlight=False)
            raise
        except OutputError as error:
            if can_resume(out):
                raise OutputError(f"{error} The same command with --resume goes on from here.") from error
            raise
    if not quiet:
        _summary(report)
    if (out / REPORT_NAME).is_file():
        write_page_unasked(out, quiet)


def _summary(report: FinetuneReport) -> None:
    steps = f"{len(report.loss)} step{'s' if len(report.loss) > 1 else ''}"
    console.print(
        f"{steps} over {report.examples:,} examples in {report.elapsed_s:.0f} s; "
        f"{report.trainable:,} of {report.parameters:,} parameters were trained.",
        highlight=False,
    )
    if report.held_out:
        (_, before), (_, after) = report.held_out[0], report.held_out[-1]
        console.print(
            f"Loss on {report.held_out_examples} held-out examples: {before:.4f} before, {after:.4f} after.",
            highlight=False,
        )
    console.print(f"{report.out} is written; every step is in its finetune.json.", highlight=False, soft_wrap=True)
