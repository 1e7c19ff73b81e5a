"""`slimllm compare`: one model pruned by several methods at the same ratios, and the perplexity of each result.

Work that methods have in common is done once: the windows, and the dense pass of methods that need the same from it. From
the first pruned layer on, activations differ.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slimllm.checkpoints.base import Checkpoint
from slimllm.checkpoints.opening import open_checkpoint
from slimllm.config import PruneConfig
from slimllm.errors import InputError
from slimllm.evaluation.perplexity import perplexity_of
from slimllm.experiments.methods import METHODS, config_of, rows_of
from slimllm.experiments.samples import with_samples
from slimllm.models.families import family_of
from slimllm.pruning.on_disk import prune_all
from slimllm.pruning.report import PruneReport
from slimllm.pruning.shapes import check_experts
from slimllm.runtime.distributed import Ranks
from slimllm.runtime.progress import ProgressCallback

_log = logging.getLogger("slimllm")


@dataclass(frozen=True)
class Compared:
    """One line of the comparison.

    Attributes:
        method: Name of the method, or `dense` for the unpruned model.
        ratio: The ratio asked for; 0 for the dense model.
        perplexity: Perplexity on the text.
        log_increase: Increase of the log perplexity over the dense model's.
        parameters: Number of parameters of the whole model.
        seconds: Seconds of pruning including the dense pass, even if another run made it.
        dense_pass_s: Seconds of computation in one dense pass.
        shared: Whether another run's dense pass was used.
        bos_token_id: BOS that the windows of the text begin with; None: no BOS.
        methods: Criterion, allocation and recovery, with their options, in words; empty for the dense model.
    """

    method: str
    ratio: float
    perplexity: float
    log_increase: float
    parameters: int
    seconds: float
    dense_pass_s: float
    shared: bool
    bos_token_id: int | None
    methods: str = ""


def _suits(checkpoint: Checkpoint, config: PruneConfig, name: str, asked: bool) -> bool:
    """Return whether a method can prune a model; if not, the reason is logged, or raised if it was asked for."""
    try:
        check_experts(family_of(checkpoint.config.model_type), config)
    except InputError as error:
        if asked:
            raise InputError(f"The method {name!r} cannot prune this model. {error}") from None
        _log.info("%s is left out: %s", name, error)
        return False
    return True


def compare(
    model: str | Path,
    ratios: Sequence[float],
    config: PruneConfig,
    token_ids: torch.Tensor,
    *,
    methods: Sequence[str] | Mapping[str, Mapping[str, Any]] = tuple(METHODS),
    seq_len: int = 128,
    max_windows: int | None = None,
    bos_token_id: int | None = None,
    workdir: Path | None = None,
    progress: ProgressCallback | None = None,
    on_line: Callable[[Compared], None] | None = None,
) -> list[Compared]:
    """Prune a model by every method at every ratio, and measure each result on the same text.

    Args:
        model: A folder, a GGUF file or a hub id.
        ratios: Fractions of the layers' parameters to remove.
        config: The common settings: calibration, memory, device. A method sets the criterion, the allocation, the recovery
            and the token weights. Without `samples`, all get as many windows as the method that needs most.
        token_ids: The evaluation text, (num_tokens,) int64; not the calibration text.
        methods: Names, see `slimllm.experiments.methods.row_of`; or settings of `PruneConfig` by a name for the table. By
            default all that suit the model.
        seq_len: Tokens per window of the text.
        max_windows: Number of windows from the beginning of the text; None: all.
        bos_token_id: As for `perplexity`.
        workdir: Folder for the current pruned model, which is deleted after it is measured; None: the system's temporary
            folder.
        progress: As for `prune`.
        on_line: Called with every line as soon as it is complete.

    Returns:
        The lines, the dense model's first.

    Raises:
        ValueError: (as InputError) a method is unknown, or an error of `prune` or `perplexity`.
    """
    if not methods or not ratios:
        raise InputError("Give at least one method and one ratio.")
    rows = rows_of(methods)
    order = [*(name for name in METHODS if name in rows), *(name for name in rows if name not in METHODS)]
    checkpoint = open_checkpoint(model)
    asked = tuple(methods) != tuple(METHODS)
    order = [name for name in order if _suits(checkpoint, config_of(config, rows[name], ratios[0]), name, asked)]
    rows = {name: rows[name] for name in order}
    config = with_samples(config, rows.values(), checkpoint)
    configs = {(name, ratio): config_of(config, rows[name], ratio) for name in order for ratio in ratios}
    lines: list[Compared] = []

    def measure(folder: str | Path) -> float:
        return perplexity_of(
            folder, token_ids, seq_len=seq_len, max_windows=max_windows, bos_token_id=bos_token_id, device=config.device
        )

    def add(line: Compared) -> None:
        lines.append(line)
        if on_line:
            on_line(line)

    dense = measure(model)
    with tempfile.TemporaryDirectory(prefix="slimllm-compare-", dir=workdir) as folder:
        jobs = [(Path(folder) / str(number), one) for number, one in enumerate(configs.values())]
        # The preset paper draws different windows, see `calibration_windows`.
        groups = [[job for job in jobs if (job[1].preset == "paper") == paper] for paper in (False, True)]
        names = dict(zip((out for out, _ in jobs), configs))

        def on_report(report: PruneReport, out: Path) -> None:
            name, ratio = names[out]
            value = measure(out)
            shutil.rmtree(out)  # free the disk space for the next model
            if not lines:
                before = report.parameters["before"]
                add(Compared("dense", 0.0, dense, 0.0, before, 0.0, report.dense_pass_s, False, bos_token_id))
            add(
                Compared(
                    name,
                    ratio,
                    value,
                    math.log(value / dense),
                    report.parameters["after"],
                    report.seconds_alone,
                    report.dense_pass_s,
                    report.dense_pass_shared,
                    bos_token_id,
                    report.methods,
                )
            )

        for group in filter(None, groups):
            prune_all(checkpoint, group, False, False, progress, None, Ranks(), on_report)
    return lines
