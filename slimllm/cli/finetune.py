"""`slimllm finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimllm.cli.options import OUT, REMOVED, Quiet, TrustRemoteCode, app, write_page_unasked
from slimllm.cli.settings import with_settings
from slimllm.cli.terminal import console, errors
from slimllm.finetuning.config import FinetuneConfig
from slimllm.runtime.progress import Progress, StepTrained

if TYPE_CHECKING:
    from slimllm.finetuning.report import FinetuneReport


@app.command("finetune")
@with_settings(FinetuneConfig, learning_rate="--lr")
def finetune_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face folder, such as one from slimllm prune.")],
    data: Annotated[
        Path,
        typer.Option(help="JSON lines, a JSON list or CSV: instruction, input, output as in Alpaca; or messages; or text."),
    ],
    out: Annotated[Path, typer.Option(*OUT, help="The folder to create.")],
    teacher: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="A model, such as the dense one, whose next-token distributions are learnt."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model in the output folder.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the interrupted training, if there is one.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    **settings: Any,
) -> None:
    """Train a pruned model, by LoRA with the paper's settings or otherwise, and write it in the same format.

    Interrupt it once to stop after the current step and save its state.
    """
    config = FinetuneConfig(**settings)  # wrong settings are refused before torch is imported

    from slimllm.checkpoints.writer import can_resume
    from slimllm.cli.display import PruneDisplay
    from slimllm.errors import OutputError
    from slimllm.finetuning import finetune
    from slimllm.pruning.report import REPORT_NAME
    from slimllm.runtime.distributed import Ranks
    from slimllm.runtime.interrupts import SafeStop

    with PruneDisplay(console, quiet) as display:
        stop = SafeStop(lambda sentence: errors.print(sentence.replace("layer", "step")), Ranks())

        def progress(event: Progress) -> None:
            display.progress(event)
            if isinstance(event, StepTrained):
                stop.progress(event)

        try:
            report = finetune(
                model,
                data,
                out,
                config,
                teacher=teacher,
                overwrite=overwrite,
                resume=resume,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
        except SystemExit:
            left = "the same command with --resume continues from here"
            errors.print(f"Interrupted; {left if can_resume(out) else REMOVED}.", style="bold red", highlight=False)
            raise
        except OutputError as error:
            if can_resume(out):
                raise OutputError(f"{error} The same command with --resume continues from here.") from error
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
        what = "Divergence from the teacher" if report.teacher and not report.config["labels"] else "Loss"
        console.print(
            f"{what} on {report.held_out_examples} held-out examples: {before:.4f} before, {after:.4f} after.",
            highlight=False,
        )
    console.print(f"{report.out} is written; every step is in its finetune.json.", highlight=False, soft_wrap=True)
