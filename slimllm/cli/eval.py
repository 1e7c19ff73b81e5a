"""`slimllm eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimllm.cli.options import OUT, Bos, TrustRemoteCode, app
from slimllm.cli.terminal import console, errors


@app.command("eval")
def eval_command(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="Folders, GGUF files or hub ids; the others are compared with the first."),
    ],
    text: Annotated[
        str | None, typer.Option(help="A file (text, JSON lines, CSV, .gz), a dataset, wikitext2 or ptb. Default: bundled.")
    ] = None,
    seq_len: Annotated[
        list[int] | None,
        typer.Option(help="Tokens per window: 128 as in the paper (default), 2048 as is common now; may be given again."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows, or answers of a task, per forward pass.")] = 8,
    max_windows: Annotated[int | None, typer.Option(help="Number of windows, from the beginning. Default: all.")] = None,
    bos: Bos = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="dtype to compute in. Default: float32 on CPU, the checkpoint's on GPU.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, … Default: a GPU if there is one.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval, such as boolq,piqa, or paper: the paper's seven. Default: none.")
    ] = None,
    few_shot: Annotated[int, typer.Option(help="Solved examples before each question.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Questions per task. Default: all.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with more task descriptions for lm-eval.")] = None,
    continuations: Annotated[
        int, typer.Option(help="Greedy continuations of the text in which repetitions are counted. Default: none.")
    ] = 0,
    out: Annotated[Path | None, typer.Option(*OUT, help="A new file for the results, as JSON.")] = None,
) -> None:
    """Measure the perplexity of models, pruned or not, on a text, and their accuracy on tasks, side by side."""
    from slimllm.calibration import about_bos
    from slimllm.checkpoints.destination import check_new_file
    from slimllm.cli.display import PruneDisplay
    from slimllm.evaluation.side_by_side import Evaluated, accuracy_table, evaluate, evaluation_table, write_json
    from slimllm.evaluation.tasks import PAPER_TASKS

    check_new_file(out)
    if text is None:
        console.print("Evaluating on the bundled text (the last fifth of War and Peace, Book One).", style="dim")

    def on_model(line: Evaluated) -> None:
        name = f"{line.model}: " if len(models) > 1 else ""
        for length, value in line.perplexity.items():
            about = f"{line.windows[length]} windows of {length} tokens, {about_bos(line.bos_token_id)}"
            console.print(f"{name}perplexity {value:.4f}   ({about})", highlight=False)
        if line.repetition is not None:
            about = f"4-grams that came before, in {continuations} greedy continuations of 128 tokens"
            console.print(f"{name}repeated {line.repetition:.1%}   ({about})", highlight=False)

    names = PAPER_TASKS if tasks == "paper" else tuple(tasks.split(",")) if tasks else ()
    with PruneDisplay(errors, quiet=False) as display:
        lines = evaluate(
            models,
            text,
            seq_lens=seq_len or [128],
            batch_size=batch_size,
            max_windows=max_windows,
            bos=bos,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            tasks=names,
            few_shot=few_shot,
            limit=limit,
            include_path=include_path,
            continuations=continuations,
            on_model=on_model,
            progress=display.progress,
        )
    if len(lines) > 1:
        console.print(evaluation_table(lines))
    if others := [line.model for line in lines if not line.log_increase]:
        console.print(
            f"The tokenizer of {', '.join(others)} gives other token ids than that of {lines[0].model}: these perplexities "
            "cannot be compared.",
            highlight=False,
            soft_wrap=True,
        )
    if names:
        console.print(accuracy_table(lines, limit))
    if out is not None:
        settings = {"max_windows": max_windows, "bos": bos, "few_shot": few_shot, "limit": limit}
        settings["continuations"] = continuations
        write_json(lines, text, out, settings)
