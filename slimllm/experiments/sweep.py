"""`slimllm sweep`: a model pruned at many ratios, with the perplexity, parameters and speed of each result."""

from __future__ import annotations

import math
import re
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch

from slimllm.checkpoints.destination import destination
from slimllm.checkpoints.opening import open_checkpoint
from slimllm.config import PruneConfig
from slimllm.errors import InputError
from slimllm.evaluation.latency import Shape, measure_latency
from slimllm.evaluation.latency.measure import check_shapes
from slimllm.evaluation.latency.worker import check_length
from slimllm.evaluation.perplexity import perplexity_of
from slimllm.experiments.methods import config_of, rows_of
from slimllm.experiments.samples import with_samples
from slimllm.models.families import family_of
from slimllm.presets import DEFAULT
from slimllm.pruning.on_disk import prune_all
from slimllm.pruning.report import PruneReport
from slimllm.pruning.shapes import check_experts
from slimllm.runtime.distributed import Ranks
from slimllm.runtime.memory import release
from slimllm.runtime.progress import ProgressCallback


@dataclass(frozen=True)
class Swept:
    """One point of the sweep.

    Attributes:
        preset: The preset, or another method, used for pruning; `dense` for the unpruned model.
        ratio: The ratio asked for; 0 for the dense model.
        parameters: Number of parameters of the whole model.
        perplexity: Perplexity on the text.
        log_increase: Increase of the log perplexity over the dense model's.
        prefill_per_s, decode_per_s: Tokens per second, medians over the rounds; the dense model's were measured together
            with the first point.
        prefill_speedup, decode_speedup: Speed-ups over the dense model, measured in turns.
        prune_s: Seconds of pruning including the dense pass, even if another run made it.
    """

    preset: str
    ratio: float
    parameters: int
    perplexity: float
    log_increase: float
    prefill_per_s: float
    decode_per_s: float
    prefill_speedup: float
    decode_speedup: float
    prune_s: float


def parse_ratios(words: Sequence[str]) -> list[float]:
    """Parse words such as `0.1:0.6:0.1` (first, last, step) or single numbers into ascending ratios.

    Raises:
        ValueError: (as InputError) a word is neither, a ratio is not between 0 and 1, or a word gives more than 100.
    """
    found: set[float] = set()
    for word in words:
        parts = word.split(":")
        if len(parts) not in (1, 3) or not all(re.fullmatch(r"\d*\.?\d+%?", part) for part in parts):
            raise InputError(f"ratio must be a number or FIRST:LAST:STEP, such as 0.1:0.6:0.1, got {word!r}.")
        first, *rest = (float(Decimal(part.rstrip("%")) / (100 if part.endswith("%") else 1)) for part in parts)
        last, step = rest or (first, 1.0)
        if step <= 0 or last < first or (last - first) / step > 100:
            raise InputError(f"ratio {word} gives no ratios, or more than 100; give another FIRST:LAST:STEP.")
        count = math.floor((last - first) / step + 1e-9)
        found |= {round(first + step * index, 9) for index in range(count + 1)}
    if not found or min(found) <= 0 or max(found) >= 1:
        raise InputError(f"Ratios must lie between 0 and 1, got {', '.join(words) or 'none'}.")
    return sorted(found)


def sweep(
    model: str | Path,
    ratios: Sequence[float],
    config: PruneConfig,
    token_ids: torch.Tensor,
    *,
    presets: Sequence[str] | Mapping[str, Mapping[str, Any]] = (DEFAULT,),
    seq_len: int = 128,
    max_windows: int | None = None,
    bos_token_id: int | None = None,
    prompt: int = 128,
    new_tokens: int = 32,
    rounds: int = 5,
    keep: str | Path | None = None,
    workdir: str | Path | None = None,
    done: Sequence[Swept] = (),
    progress: ProgressCallback | None = None,
    on_point: Callable[[Swept], None] | None = None,
) -> list[Swept]:
    """Prune a model at every ratio; measure each result's perplexity on a text, and its speed against the dense model's.

    Args:
        model: A folder, a GGUF file or a hub id.
        ratios: Fractions of the layers' parameters to remove.
        config: Calibration, memory, device; the preset sets criterion, allocation, recovery and token weights. Without
            `samples`, all presets get as many windows as the one that needs most.
        token_ids: The evaluation text, (num_tokens,) int64; not the calibration text.
        presets: Names of presets or other methods, as for `compare`. Each prunes at all ratios, with one dense pass.
        seq_len, max_windows, bos_token_id: Windows of the evaluation text, as for `perplexity`.
        prompt, new_tokens, rounds: As for `measure_latency`.
        keep: Folder in which pruned models are kept as PRESET/RATIO; None: each is deleted after it is measured.
        workdir: Folder for the current model if `keep` is None; None: the system's temporary folder.
        done: Points of an earlier sweep with the same settings, which are not measured again.
        progress: As for `prune`.
        on_point: Called with every point as soon as it is complete.

    Returns:
        The points, the dense model's first, then by preset and ratio.

    Raises:
        ValueError: (as InputError) an error of `prune`, `perplexity` or `measure_latency`.
    """
    if not ratios or not presets:
        raise InputError("Give at least one ratio and one preset.")
    check_shapes([1], [prompt], new_tokens, rounds)
    points = list(done)
    checkpoint = open_checkpoint(model)
    check_length(checkpoint.config, str(model), Shape(1, prompt, new_tokens))
    there = {(point.preset, point.ratio) for point in points}
    rows = rows_of(presets)
    config = with_samples(config, rows.values(), checkpoint)
    configs = {
        (preset, ratio): config_of(config, row, ratio)
        for preset, row in rows.items()
        for ratio in ratios
        if (preset, ratio) not in there
    }

    for one in configs.values():
        check_experts(family_of(checkpoint.config.model_type), one)

    def add(point: Swept) -> None:
        points.append(point)
        if on_point:
            on_point(point)

    def measured(folder: str | Path) -> float:
        return perplexity_of(
            folder, token_ids, seq_len=seq_len, max_windows=max_windows, bos_token_id=bos_token_id, device=config.device
        )

    def on_report(report: PruneReport, out: Path) -> None:
        preset, ratio = names[out]
        if (preset, ratio) in there:
            return
        release()
        speed = measure_latency([model, out], prompts=[prompt], new_tokens=new_tokens, rounds=rounds, device=config.device)
        if "dense" not in {point.preset for point in points}:
            first = speed.lines[0]
            prefill, decode = statistics.median(first.prefill_rates), statistics.median(first.decode_rates)
            add(Swept("dense", 0.0, report.parameters["before"], dense, 0.0, prefill, decode, 1.0, 1.0, 0.0))
        line, value = speed.lines[1], measured(out)
        add(
            Swept(
                preset,
                ratio,
                report.parameters["after"],
                value,
                math.log(value / dense),
                statistics.median(line.prefill_rates),
                statistics.median(line.decode_rates),
                speed.speedup(line, "prefill_rates"),
                speed.speedup(line, "decode_rates"),
                report.seconds_alone,
            )
        )
        if keep is None:
            shutil.rmtree(out)  # free the disk space for the next model

    names: dict[Path, tuple[str, float]] = {}
    dense = next((point.perplexity for point in points if point.preset == "dense"), None) or measured(model)
    with tempfile.TemporaryDirectory(prefix="slimllm-sweep-", dir=workdir) as folder:
        for preset in rows:
            where = destination(Path(keep or folder) / preset)
            jobs = [(where / str(ratio), one) for (name, ratio), one in configs.items() if name == preset]
            names |= {out: (preset, one.ratio) for out, one in jobs}
            if jobs:
                prune_all(checkpoint, jobs, False, keep is not None, progress, None, Ranks(), on_report)
    order = {preset: number for number, preset in enumerate(["dense", *rows])}
    return sorted(points, key=lambda point: (order.get(point.preset, len(order)), point.ratio))


def on_front(points: Sequence[Swept]) -> set[tuple[str, float]]:
    """Return the Pareto front of parameters and perplexity, as (preset, ratio).

    A point is beaten by another that is not higher in either quantity, and lower in at least one.
    """

    def beaten(point: Swept) -> bool:
        return any(
            other.parameters <= point.parameters
            and other.perplexity <= point.perplexity
            and (other.parameters, other.perplexity) != (point.parameters, point.perplexity)
            for other in points
        )

    return {(point.preset, point.ratio) for point in points if not beaten(point)}
