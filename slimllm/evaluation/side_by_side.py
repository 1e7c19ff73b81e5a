"""Evaluation of several models on one text, the dense one first. Called by `slimllm eval` and users."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from slimllm.calibration import about_bos, window_bos, windows_of
from slimllm.errors import InputError
from slimllm.evaluation.perplexity import evaluation_tokens, load, locate, perplexity
from slimllm.evaluation.repetition import repetition
from slimllm.evaluation.tasks import task_manager, zero_shot
from slimllm.pruning.report import versions
from slimllm.runtime.cores import share_cores
from slimllm.runtime.memory import release
from slimllm.runtime.progress import ProgressCallback


@dataclass(frozen=True)
class Evaluated:
    """Results of one model.

    Attributes:
        model: The model, as given by the user.
        parameters: Number of parameters of the whole model; embeddings shared with the head count once.
        perplexity: Perplexity, by window length in tokens.
        log_increase: Increase of the log perplexity over the first model's, by window length; empty if the two tokenizers
            give different token ids, so that perplexities cannot be compared.
        windows: Number of windows, by window length.
        bos_token_id: BOS that every window begins with; None: no BOS.
        accuracy: Accuracy from 0 to 1, by task.
        mean_accuracy: Mean over the tasks; None if there are no tasks.
        retention: Mean accuracy in % of the first model's.
        repetition: Share of repeated 4-grams in greedy continuations, see `repetition`; None: it was not measured.
        dtype, device: Dtype and device of the computation.
        seconds: Time to load and measure.
    """

    model: str
    parameters: int
    perplexity: dict[int, float]
    log_increase: dict[int, float]
    windows: dict[int, int]
    bos_token_id: int | None
    accuracy: dict[str, float]
    mean_accuracy: float | None
    retention: float | None
    repetition: float | None
    dtype: str
    device: str
    seconds: float


@share_cores()
def evaluate(
    models: Sequence[str | Path],
    text: str | None = None,
    *,
    seq_lens: Sequence[int] = (128,),
    batch_size: int = 8,
    max_windows: int | None = None,
    bos: str = "auto",
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    tasks: Sequence[str] = (),
    few_shot: int = 0,
    limit: int | None = None,
    include_path: Path | None = None,
    continuations: int = 0,
    on_model: Callable[[Evaluated], None] | None = None,
    progress: ProgressCallback | None = None,
) -> list[Evaluated]:
    """Measure the perplexity of models on one text and their accuracy on tasks, with one model in memory at a time.

    Each model's own tokenizer splits the text, so perplexities of models with different tokenizers cannot be compared.

    Args:
        models: Folders, GGUF files or hub ids; the others are compared with the first.
        text: A file or a dataset, see `slimllm.calibration.read_texts`; None: the bundled text.
        seq_lens: Tokens in a window: 128 as in the paper, 2048 as is common now.
        batch_size, max_windows: As for `perplexity`.
        bos: As for `PruneConfig`.
        dtype, device, trust_remote_code: As for `load`.
        tasks, few_shot, limit, include_path: As for `zero_shot`; no tasks: only perplexity.
        continuations: Number of greedy continuations, see `repetition`, of the part of the text that `max_windows` leaves;
            0: none.
        on_model: Called with each model's results as soon as they are complete.
        progress: As for `perplexity`.

    Raises:
        ValueError: (as InputError) a model does not exist, which is checked before any is loaded; or an error of `load`,
            `perplexity`, `repetition` or `zero_shot`.
    """
    if not models or not seq_lens:
        raise InputError("Give at least one model and one window length.")
    if continuations < 0:
        raise InputError(f"continuations must be at least 0, got {continuations}.")
    for model in models:
        locate(model, code=trust_remote_code, only=("config.json",))
    if tasks:
        task_manager(tasks, include_path)
    done: list[Evaluated] = []
    for model in models:
        started = time.perf_counter()
        loaded, tokenizer = load(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        tokens = evaluation_tokens(tokenizer, text, max(seq_lens), max_windows, bos)
        bos_token_id, found, windows = window_bos(tokenizer, bos), {}, {}
        repeated = None
        if continuations:
            repeated = repetition(
                loaded, tokens, continuations=continuations, bos_token_id=bos_token_id, batch_size=batch_size
            )
        for seq_len in seq_lens:
            found[seq_len] = perplexity(
                loaded,
                tokens,
                seq_len=seq_len,
                batch_size=batch_size,
                max_windows=max_windows,
                bos_token_id=bos_token_id,
                progress=progress,
            )
            windows[seq_len] = len(windows_of(tokens, seq_len, bos_token_id)[:max_windows])
        if not done:
            first, first_tokens, first_bos = found, tokens, bos_token_id
        alike = torch.equal(tokens, first_tokens) and bos_token_id == first_bos
        increase = {seq_len: math.log(value / first[seq_len]) for seq_len, value in found.items() if alike}
        accuracy: dict[str, float] = {}
        if tasks:
            accuracy = zero_shot(
                loaded, tokenizer, tasks, few_shot=few_shot, limit=limit, include_path=include_path, batch_size=batch_size
            )
        mean = sum(accuracy.values()) / len(accuracy) if accuracy else None
        dense = done[0].mean_accuracy if done else mean
        done.append(
            Evaluated(
                model=str(model),
                parameters=sum(parameter.numel() for parameter in loaded.parameters()),
                perplexity=found,
                log_increase=increase,
                windows=windows,
                bos_token_id=bos_token_id,
                accuracy=accuracy,
                mean_accuracy=mean,
                retention=100 * mean / dense if mean is not None and dense else None,
                repetition=repeated,
                dtype=str(loaded.dtype).removeprefix("torch."),
                device=str(loaded.device),
                seconds=time.perf_counter() - started,
            )
        )
        if on_model:
            on_model(done[-1])
        del loaded
        release()  # otherwise this model would still take memory while the next one is loaded
    return done


def evaluation_table(lines: list[Evaluated]) -> Table:
    """Make a table with a line for each model, named by the last part of its path; increases are over the first model."""
    begin = ", ".join(dict.fromkeys(about_bos(line.bos_token_id) for line in lines))
    title = f"perplexity ({begin}), by tokens in a window"
    table = Table(box=None, padding=(0, 1), header_style="bold", title=title, title_justify="left")
    table.add_column("model", overflow="fold", min_width=12)
    lengths = list(lines[0].perplexity)
    titles = [title for length in lengths for title in (f"at {length}", "log incr.")]
    repeated = ["repeated"] if lines[0].repetition is not None else []
    for title in ("parameters", *titles, *repeated, "s"):
        table.add_column(title, justify="right", no_wrap=True)
    for line in lines:
        cells = [Path(line.model).resolve().name, f"{line.parameters:,}"]
        for length in lengths:
            increase = "" if line is lines[0] or not line.log_increase else f"{line.log_increase[length]:.3f}"
            cells += [f"{line.perplexity[length]:.2f}", increase]
        if line.repetition is not None:
            cells.append(f"{line.repetition:.0%}")
        table.add_row(*cells, f"{line.seconds:.1f}")
    return table


# Column titles of the paper.
_TITLES = {
    "boolq": "BoolQ",
    "piqa": "PIQA",
    "hellaswag": "HellaS",
    "winogrande": "WinoG",
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "openbookqa": "OBQA",
}


def accuracy_table(lines: list[Evaluated], limit: int | None = None) -> Table:
    """Make a table with a line for each model: accuracies in %, their mean, and the mean in % of the first model's."""
    title = f"accuracy, %, on the first {limit} questions of each" if limit else "accuracy, %"
    table = Table(box=None, padding=(0, 1), header_style="bold", title=title, title_justify="left")
    table.add_column("model", overflow="fold", min_width=12)
    for task in lines[0].accuracy:
        table.add_column(_TITLES.get(task, task), justify="right")
    table.add_column("mean", justify="right")
    table.add_column("kept", justify="right")
    for line in lines:
        cells = [f"{100 * value:.1f}" for value in (*line.accuracy.values(), line.mean_accuracy or 0.0)]
        table.add_row(Path(line.model).resolve().name, *cells, f"{line.retention:.1f}" if line.retention else "")
    return table


def write_json(lines: list[Evaluated], text: str | None, path: Path, settings: dict[str, Any]) -> None:
    """Write the results, the name of the text, further settings and the versions to a new JSON file."""
    content = {
        "text": text or "bundled",
        **settings,
        "versions": versions(),
        "models": [dataclasses.asdict(line) for line in lines],
    }
    with path.open("x", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
