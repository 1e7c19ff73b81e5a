"""The command line: arguments to the same functions that Python users call. An error of the input exits with 2."""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import sys
from pathlib import Path
from signal import signal
from typing import Annotated, Any

import typer
from rich.console import Console

from slimllm.errors import InputError, LostRankError, OtherRankError, OutputError
from slimllm.interrupts import SIGNALS, SafeStop, leave
from slimllm.parallel import Ranks, end, launched

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
errors = Console(stderr=True)

_REMOVED = "what was begun is removed"

Model = Annotated[str, typer.Argument(help="A Hugging Face folder, a GGUF file or a hub id.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]


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


@app.command("prune")
def prune_command(
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    ratio: Annotated[
        list[float],
        typer.Option(help="Fraction of the decoder layers' parameters to remove. Several: OUT/0.2, OUT/0.35, … in one go."),
    ],
    preset: Annotated[str, typer.Option(help="default, or paper: the published settings.")] = "default",
    head_unit: Annotated[str, typer.Option(help="kv-group, or query: as many query heads from every group.")] = "kv-group",
    recovery: Annotated[str, typer.Option(help="affine (the paper's), lstsq (all kept weights), or none.")] = "affine",
    token_weights: Annotated[
        str, typer.Option(help="norm: a token counts by what the next norm divides it by. none: all alike, as published.")
    ] = "none",
    calibration: Annotated[
        str | None,
        typer.Option(help="FILE.txt, FILE.jsonl or a dataset name[:config[:split]]. Default: bundled text."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 32,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the draw of the windows.")] = 0,
    batch_size: Annotated[int | None, typer.Option(help="Windows in a forward pass. Default: about 1024 tokens.")] = None,
    pruned_layers: Annotated[
        int | None, typer.Option(help="n, layers to prune. Default: 81 % of them (ratio 0.2) to 94 % (0.5).")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Temperature of the allocation. Default: 10 (ratio 0.2) to 7 (0.5).")
    ] = None,
    keep_lowest: Annotated[
        float | None, typer.Option(help="Fraction of the least important channels kept. Default: 0, paper: 0.01.")
    ] = None,
    round_to: Annotated[
        int | None, typer.Option(help="Widths are multiples of this. Default: up to 64, as the target allows.")
    ] = None,
    feature_space: Annotated[
        str | None, typer.Option(help="eigh, or function: no eigenvectors. Default: the faster on the device.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16. Default: the checkpoint's.")] = None,
    compute_dtype: Annotated[
        str | None,
        typer.Option(help="dtype of the forward passes. Default: float32 on CPU, the checkpoint's on GPU."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, … Default: a GPU if there is one.")] = None,
    host_memory: Annotated[str | None, typer.Option(help="Budget, such as 16GiB: the run is done so that it fits.")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="The same, of the GPU.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model in the output folder.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run for this folder that was interrupted, if one was.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Prune a model and write the result as a Hugging Face folder.

    Under torchrun (torchrun --nproc-per-node 4 -m slimllm prune …) the processes share the calibration windows.
    """
    from slimllm.config import PruneConfig
    from slimllm.display import PruneDisplay
    from slimllm.engine import prune, prune_ratios
    from slimllm.writer import can_resume

    results = [out] if len(ratio) == 1 else [out / str(one) for one in ratio]
    command = shlex.join(["slimllm", *(argument for argument in sys.argv[1:] if argument != "--resume")])
    with launched(device) as group:
        ranks = Ranks(group)
        with ranks.together():
            config = PruneConfig(
                ratio=ratio[0], preset=preset, head_unit=head_unit, recovery=recovery, token_weights=token_weights,
                calibration=calibration, samples=samples, seq_len=seq_len, seed=seed, batch_size=batch_size,
                pruned_layers=pruned_layers, alpha=alpha, keep_lowest=keep_lowest, round_to=round_to,
                feature_space=feature_space, dtype=dtype, compute_dtype=compute_dtype, device=device,
                host_memory=host_memory, gpu_memory=gpu_memory,
            )  # fmt: skip
        tell = errors.print if ranks.first else _say_nothing
        stop = SafeStop(lambda sentence: tell(sentence, style="bold red"), ranks)

        def progress(stage: str, index: int, num_layers: int, layer: dict[str, Any] | None) -> None:
            display.progress(stage, index, num_layers, layer)
            stop.progress(stage, index, num_layers, layer)

        try:
            with PruneDisplay(console, quiet or not ranks.first) as display:
                settings: Any = {"overwrite": overwrite, "resume": resume, "progress": progress, "notice": display.notice}
                settings |= {"command": command, "group": group}
                if len(ratio) == 1:
                    reports = [prune(model, out, config, **settings)]
                else:
                    reports = prune_ratios(model, out, config, ratio, **settings)
        except SystemExit:
            left = "the same command with --resume goes on from here"
            tell(f"Interrupted; {left if any(map(can_resume, results)) else _REMOVED}.", style="bold red", highlight=False)
            raise
        except (OutputError, LostRankError) as error:
            if any(map(can_resume, results)):
                raise type(error)(f"{error} The same command with --resume goes on from here.") from error
            raise
        for report in reports if ranks.first and not quiet else []:
            display.summary(report)


@app.command("plan")
def plan_command(
    model: Annotated[str, typer.Argument(help="A folder, a GGUF file, a hub id, or the name of a shape: llama-33b, …")],
    ratio: Annotated[float, typer.Option(help="Fraction of the decoder layers' parameters to remove.")] = 0.2,
    recovery: Annotated[str, typer.Option(help="affine, lstsq or none.")] = "affine",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 32,
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
    from slimllm.bench.forecast import forecast
    from slimllm.config import PruneConfig
    from slimllm.display import print_forecast

    config = PruneConfig(
        ratio=ratio, recovery=recovery, samples=samples, seq_len=seq_len, dtype=dtype, compute_dtype=compute_dtype,
        device=None if device == "cuda" else device, host_memory=host_memory, gpu_memory=gpu_memory,
    )  # fmt: skip
    print_forecast(console, forecast(model, config, ranks, for_gpu=device == "cuda"))


@app.command("eval")
def eval_command(
    model: Model,
    text: Annotated[str | None, typer.Option(help="FILE.txt, FILE.jsonl or a dataset. Default: bundled text.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens per window: 128 as in the paper, 2048 as is common now.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Windows in a forward pass.")] = 8,
    max_windows: Annotated[int | None, typer.Option(help="Only so many windows from the beginning.")] = None,
    dtype: Annotated[str | None, typer.Option(help="dtype to compute in. Default: float32 on CPU.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, … Default: a GPU if there is one.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Perplexity of a model, pruned or not, over non-overlapping windows of a text."""
    from slimllm.calibration import bundled_text, read_texts, tokenize
    from slimllm.evaluate import load, perplexity

    loaded, tokenizer = load(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if text is None:
        console.print("Evaluating on the bundled text (the last fifth of War and Peace, Book One).", style="dim")
        documents = [bundled_text("evaluation")]
    else:
        documents = read_texts(text, (max_windows or 2048) * seq_len)
    tokens = tokenize(tokenizer, documents)
    windows = min(len(tokens) // seq_len, max_windows or len(tokens))
    value = perplexity(loaded, tokens, seq_len=seq_len, batch_size=batch_size, max_windows=max_windows)
    console.print(f"perplexity {value:.4f}   ({windows} windows of {seq_len} tokens)", highlight=False)


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="The folder to make.")] = Path("slimllm-demo"),
    ratio: Annotated[float, typer.Option(help="Fraction of the decoder layers' parameters to remove.")] = 0.2,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model in the output folder.")] = False,
) -> None:
    """Prune a small real model and show what it was and what it is."""
    from slimllm.demo import run_demo

    run_demo(out, ratio, overwrite, console)


@app.command("bench")
def bench_command(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Folders, GGUF files, hub ids, or names of shapes (random weights): llama-7b, llama-33b, …"),
    ] = None,
    layers: Annotated[list[int] | None, typer.Option(help="Only so many layers. Default: all.")] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="Fraction of the layers' parameters. Default: 0.2.")] = None,
    recovery: Annotated[list[str] | None, typer.Option(help="affine, lstsq or none. Default: affine.")] = None,
    samples: Annotated[list[int] | None, typer.Option(help="Calibration windows. Default: 32.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 128,
    preset: Annotated[str, typer.Option(help="default, or paper: the published settings.")] = "default",
    rounds: Annotated[int, typer.Option(help="Runs of each setting; the table shows medians.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, … Default: a GPU if there is one.")] = None,
    compute_dtype: Annotated[str | None, typer.Option(help="dtype of the forward passes.")] = None,
    on_disk: Annotated[bool, typer.Option("--on-disk", help="Write random weights to disk first, and read them.")] = False,
    workdir: Annotated[Path | None, typer.Option(help="Where models are written, and deleted again.")] = None,
    out: Annotated[Path, typer.Option(help="File of results; rows are appended.")] = Path("slimllm-bench.jsonl"),
    plot: Annotated[
        Path | None, typer.Option(help="Draw all of --out into this .png or .svg; models may be left out.")
    ] = None,
) -> None:
    """Measure pruning throughput: seconds by stage, memory, and the distance to the floor of the counted work.

    Options that may be given more than once (--samples 8 --samples 32) are measured in all combinations.
    """
    from slimllm.bench.display import run_bench

    run_bench(
        console, models or [], layers=layers or [None], ratio=ratio or [0.2], recovery=recovery or ["affine"],
        samples=samples or [32], seq_len=seq_len, preset=preset, rounds=rounds, device=device, compute_dtype=compute_dtype,
        on_disk=on_disk, workdir=workdir, out=out, plot=plot,
    )  # fmt: skip


@app.command("doctor")
def doctor_command() -> None:
    """Show what this machine has, and which backend each operation uses on it and why."""
    from slimllm.display import show_diagnosis
    from slimllm.doctor import diagnose, settings

    show_diagnosis(console, diagnose(), settings())


def _interrupted(number: int, frame: object) -> None:
    if os.environ.get("RANK", "0") == "0":
        errors.print(f"Interrupted; {_REMOVED}.", style="bold red")
    leave(number)


def _say_nothing(*words: object, **style: object) -> None:
    """In place of printing, on all ranks but the first."""


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
