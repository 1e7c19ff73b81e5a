"""The commands that measure and show: compare, sweep, eval, latency, demo, bench, doctor."""

from __future__ import annotations

from pathlib import Path
from signal import signal
from typing import Annotated

import typer

from slimllm.cli.busy import watch_for_other_work
from slimllm.cli.options import (
    OUT,
    RATIO,
    Bos,
    CalibrationText,
    EvalLen,
    EvalText,
    MaxWindows,
    Model,
    Preset,
    Quiet,
    Samples,
    Seed,
    TrustRemoteCode,
    app,
    fraction,
)
from slimllm.cli.terminal import console, errors
from slimllm.runtime.interrupts import SIGNALS, leave


@app.command("compare")
def compare_command(
    model: Model,
    ratio: Annotated[
        list[float] | None,
        typer.Option(*RATIO, parser=fraction, help="Several give a table of each. Default: 0.2 and 0.5."),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="best, slimllm, flap, wanda-sp, …; may be given again. Default: all.")
    ] = None,
    text: EvalText = None,
    eval_len: EvalLen = 128,
    max_windows: MaxWindows = 64,
    bos: Bos = "auto",
    calibration: CalibrationText = None,
    samples: Samples = 32,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 128,
    seed: Seed = 0,
    head_unit: Annotated[str, typer.Option(help="kv-group, or query.")] = "kv-group",
    compute_dtype: Annotated[str | None, typer.Option(help="dtype of the forward passes.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, … Default: a GPU if there is one.")] = None,
    workdir: Annotated[Path | None, typer.Option(help="Where the model at work is written, and deleted again.")] = None,
    out: Annotated[Path | None, typer.Option(*OUT, help="A new file for the lines, as JSONL.")] = None,
    quiet: Quiet = False,
) -> None:
    """Prune a model by several methods at the same ratios, and print the perplexity of each; no model is kept."""
    from slimllm.cli.compare_display import run_compare
    from slimllm.config import PruneConfig

    config = PruneConfig(
        ratio=0.5, calibration=calibration, bos=bos, samples=samples, seq_len=seq_len, seed=seed, head_unit=head_unit,
        compute_dtype=compute_dtype, device=device,
    )  # fmt: skip
    with watch_for_other_work(quiet, device):
        run_compare(
            console, model, ratio or [0.2, 0.5], config, method, text, eval_len, max_windows or None, workdir, out, quiet
        )


@app.command("sweep")
def sweep_command(
    model: Model,
    ratio: Annotated[
        list[str] | None,
        typer.Option(*RATIO, help="FIRST:LAST:STEP, or a number; may be given again. Default: 0.1:0.6:0.1."),
    ] = None,
    preset: Annotated[list[str] | None, typer.Option(help="As for prune; may be given again. Default: default.")] = None,
    out: Annotated[Path, typer.Option(*OUT, help="Folder for the points and the picture.")] = Path("slimllm-sweep"),
    text: EvalText = None,
    eval_len: EvalLen = 128,
    max_windows: MaxWindows = 64,
    bos: Bos = "auto",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt when the speed is measured.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens that are generated then.")] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds of the speed's measurement.")] = 5,
    calibration: CalibrationText = None,
    samples: Samples = 32,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 128,
    seed: Seed = 0,
    head_unit: Annotated[str, typer.Option(help="kv-group, or query.")] = "kv-group",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, … Default: a GPU if there is one.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the models: OUT/PRESET/RATIO.")] = False,
    workdir: Annotated[Path | None, typer.Option(help="Where models are written, and deleted again.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep in that folder.")] = False,
    quiet: Quiet = False,
) -> None:
    """Prune at many ratios: perplexity against parameters and against measured speed, as a table and a picture."""
    from slimllm.cli.sweep_display import run_sweep
    from slimllm.config import PruneConfig
    from slimllm.experiments.sweep import parse_ratios

    for number in SIGNALS:  # the points that are there stay
        signal(number, leave)
    ratios = parse_ratios(ratio or ["0.1:0.6:0.1"])
    config = PruneConfig(
        ratio=ratios[0], calibration=calibration, bos=bos, samples=samples, seq_len=seq_len, seed=seed, head_unit=head_unit,
        device=device,
    )  # fmt: skip
    try:
        with watch_for_other_work(quiet, device):
            run_sweep(
                console, model, ratios, preset or ["default"], config, text, eval_len, max_windows or None, prompt,
                new_tokens, rounds, out, keep, workdir, resume, quiet,
            )  # fmt: skip
    except SystemExit:
        errors.print(f"Interrupted; with --resume the sweep in {out} goes on.", style="bold red", highlight=False)
        raise


@app.command("eval")
def eval_command(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL", help="Folders, GGUF files or hub ids; the first is what the others are compared with."
        ),
    ],
    text: Annotated[
        str | None, typer.Option(help="A file (text, JSON lines, CSV, .gz), a dataset, wikitext2 or ptb. Default: bundled.")
    ] = None,
    seq_len: Annotated[
        list[int] | None,
        typer.Option(help="Tokens per window: 128 as in the paper (default), 2048 as is common now; may be given again."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows, or answers of a task, in a forward pass.")] = 8,
    max_windows: Annotated[int | None, typer.Option(help="Only so many windows from the beginning.")] = None,
    bos: Bos = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="dtype to compute in. Default: float32 on CPU, the checkpoint's on GPU.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, … Default: a GPU if there is one.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval, boolq,piqa,…, or paper: the paper's seven. Default: none.")
    ] = None,
    few_shot: Annotated[int, typer.Option(help="So many solved examples before each question.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Only so many questions of each task.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with more descriptions of tasks for lm-eval.")] = None,
    out: Annotated[Path | None, typer.Option(*OUT, help="A new file for the figures, as JSON.")] = None,
) -> None:
    """Perplexity of models, pruned or not, over windows of a text, and accuracy on tasks; several side by side."""
    from slimllm.calibration import about_bos
    from slimllm.checkpoints.destination import check_new_file
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

    names = PAPER_TASKS if tasks == "paper" else tuple(tasks.split(",")) if tasks else ()
    lines = evaluate(
        models, text, seq_lens=seq_len or [128], batch_size=batch_size, max_windows=max_windows, bos=bos,
        dtype=dtype, device=device, trust_remote_code=trust_remote_code, tasks=names, few_shot=few_shot, limit=limit,
        include_path=include_path, on_model=on_model,
        notice=lambda sentence: errors.print(sentence, highlight=False, soft_wrap=True),
    )  # fmt: skip
    if len(lines) > 1:
        console.print(evaluation_table(lines))
    if others := [line.model for line in lines if not line.log_increase]:
        console.print(
            f"The tokenizer of {', '.join(others)} gives other token ids than that of {lines[0].model}: these perplexities "
            "cannot be compared.", highlight=False, soft_wrap=True,
        )  # fmt: skip
    if names:
        console.print(accuracy_table(lines, limit))
    if out is not None:
        settings = {"max_windows": max_windows, "bos": bos, "few_shot": few_shot, "limit": limit}
        write_json(lines, text, out, settings)


@app.command("latency")
def latency_command(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL", help="Folders, GGUF files or hub ids; the first is what the others are compared with."
        ),
    ],
    batch_size: Annotated[list[int] | None, typer.Option(help="Prompts at once; may be given again. Default: 1.")] = None,
    prompt: Annotated[
        list[int] | None, typer.Option(help="Tokens of a prompt; may be given again. Default: 128 and 512.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens that are generated for each prompt, 2 at least.")] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds, in each of which every model has its turn.")] = 5,
    dtype: Annotated[
        str | None, typer.Option(help="dtype to compute in. Default: float32 on CPU, the checkpoint's on GPU.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, … Default: a GPU if there is one.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    out: Annotated[Path | None, typer.Option(*OUT, help="A new file for all figures, as JSON.")] = None,
    quiet: Quiet = False,
) -> None:
    """Time generation: the prompt's pass and decoding, of models, dense and pruned, in turn.

    All models are in memory at once, each in a process of its own.
    """
    from slimllm.checkpoints.destination import check_new_file
    from slimllm.evaluation.latency import measure_latency
    from slimllm.evaluation.latency.display import about_speeds, latency_progress, model_table, speed_table

    check_new_file(out)
    with watch_for_other_work(quiet, device), latency_progress(errors, quiet) as progress:
        found = measure_latency(
            models, batch_sizes=batch_size or [1], prompts=prompt or [128, 512], new_tokens=new_tokens, rounds=rounds,
            dtype=dtype, device=device, trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
    if not quiet:
        console.print(model_table(found))
        console.print(speed_table(found))
        console.print(about_speeds(found), style="dim", highlight=False)
    if out is not None:
        found.write(out)


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(*OUT, help="The folder to make.")] = Path("slimllm-demo"),
    ratio: Annotated[
        float, typer.Option(*RATIO, parser=fraction, help="Fraction of the decoder layers' parameters to remove.")
    ] = 0.2,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model in the output folder.")] = False,
) -> None:
    """Prune a small real model and show what it was and what it is."""
    from slimllm.cli.demo import run_demo

    run_demo(out, ratio, overwrite, console)


@app.command("bench")
def bench_command(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Folders, GGUF files, hub ids, or names of shapes (random weights): llama-7b, llama-33b, …",
        ),
    ] = None,
    layers: Annotated[list[int] | None, typer.Option(help="Only so many layers. Default: all.")] = None,
    ratio: Annotated[
        list[float] | None, typer.Option(*RATIO, parser=fraction, help="Fraction of the layers' parameters. Default: 0.2.")
    ] = None,
    recovery: Annotated[list[str] | None, typer.Option(help="affine, lstsq, bias or none. Default: the preset's.")] = None,
    samples: Annotated[list[int] | None, typer.Option(help="Calibration windows. Default: 32.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 128,
    preset: Preset = "default",
    rounds: Annotated[int, typer.Option(help="Runs of each setting; the table shows medians.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, … Default: a GPU if there is one.")] = None,
    compute_dtype: Annotated[str | None, typer.Option(help="dtype of the forward passes.")] = None,
    on_disk: Annotated[bool, typer.Option("--on-disk", help="Write random weights to disk first, and read them.")] = False,
    workdir: Annotated[Path | None, typer.Option(help="Where models are written, and deleted again.")] = None,
    out: Annotated[Path, typer.Option(*OUT, help="File of results; rows are appended.")] = Path("slimllm-bench.jsonl"),
    plot: Annotated[
        Path | None, typer.Option(help="Draw all of --out into this .png or .svg; models may be left out.")
    ] = None,
) -> None:
    """Measure pruning throughput: seconds by stage, memory, and the distance to the floor of the counted work.

    Options that may be given more than once (--samples 8 --samples 32) are measured in all combinations.
    """
    from slimllm.experiments.bench.display import run_bench

    run_bench(
        console, models or [], layers=layers or [None], ratio=ratio or [0.2], recovery=recovery or [None],
        samples=samples or [32], seq_len=seq_len, preset=preset, rounds=rounds, device=device, compute_dtype=compute_dtype,
        on_disk=on_disk, workdir=workdir, out=out, plot=plot,
    )  # fmt: skip


@app.command("doctor")
def doctor_command() -> None:
    """Show what this machine has, and which backend each operation uses on it and why."""
    from slimllm.cli.display import show_diagnosis
    from slimllm.runtime.doctor import diagnose, settings

    show_diagnosis(console, diagnose(), settings())
