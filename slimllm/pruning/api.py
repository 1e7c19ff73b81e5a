"""Python interface: `prune` and `prune_ratios` for a model on disk, `prune_model` for a model in memory."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimllm.calibration import calibration_windows
from slimllm.checkpoints.base import Checkpoint
from slimllm.checkpoints.destination import destination
from slimllm.checkpoints.output_format import convert_in_place
from slimllm.checkpoints.source import InMemoryModel
from slimllm.checks import GIB
from slimllm.config import PruneConfig, check_config
from slimllm.errors import InputError
from slimllm.pruning.identity import compare_identities, identity_in_memory
from slimllm.pruning.on_disk import prune_all
from slimllm.pruning.pipeline import Pruning
from slimllm.pruning.programs import fit_programs
from slimllm.pruning.report import PruneReport
from slimllm.pruning.run import Run
from slimllm.pruning.shapes import samples_for, tokens_to_fit
from slimllm.runtime import memory
from slimllm.runtime.cores import share_cores
from slimllm.runtime.distributed import Ranks
from slimllm.runtime.progress import ProgressCallback


def prune(
    model: str | Path | Checkpoint,
    out: str | Path,
    config: PruneConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: ProgressCallback | None = None,
    command: str | None = None,
    group: ProcessGroup | None = None,
) -> PruneReport:
    """Prune a model on disk, one layer in memory at a time, and write the result as a Hugging Face folder.

    Args:
        model: A Hugging Face folder, a GGUF file, a hub id, or a checkpoint from `open_checkpoint`.
        out: The folder to make. It appears when it is complete.
        config: The settings.
        overwrite: Replace a model that is in `out` already.
        resume: Resume the interrupted run, if there is one. The result is the same as without the interruption.
        progress: Called after every layer with a `LayerMeasured` or `LayerPruned`. If it raises an exception, the run stops
            there. In a group it is called, and has to raise, in every process.
        command: The command line, for the model card; None: the equivalent Python call.
        group: Processes of torch.distributed that prune together. All of them make this call, and the first one writes.
            None: this process alone.

    Returns:
        The report, which is also written to `out`/report.json.

    Raises:
        ValueError: (as InputError) the input is wrong, or the run to resume has other settings, another model or another
            text; `out` is then untouched. (as OutputError or LostRankError, which are InputErrors) the disk is full or
            failed, or another process of the group is gone; the run can then be resumed.
    """
    check_config(config)
    jobs, ranks = [(destination(out), config)], Ranks(group)
    with ranks.one_log():
        return prune_all(model, jobs, overwrite, resume, progress, command, ranks)[0]


def prune_ratios(
    model: str | Path | Checkpoint,
    out: str | Path,
    config: PruneConfig,
    ratios: Sequence[float],
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: ProgressCallback | None = None,
    command: str | None = None,
    group: ProcessGroup | None = None,
) -> list[PruneReport]:
    """Prune at several ratios, one after the other; `out`/0.2, `out`/0.35, … are the same as from single runs of `prune`.

    The common work is done once: opening the model, drawing the calibration windows, and the dense pass, which measures the
    layers and does not depend on the ratio. From the first pruned layer on, activations differ and nothing can be shared.

    Args:
        model, overwrite, resume, progress, command, group: As for `prune`; with `resume`, complete results are kept.
        out: The folder to make the results in; it may exist.
        config: The settings; `ratio` does not apply.
        ratios: The ratios, all different.

    Returns:
        The reports, in the order of the ratios.

    Raises:
        ValueError: (as InputError) as for `prune`, or a ratio is given twice, or no ratio is given.
    """
    check_config(config)
    if not ratios or len(set(ratios)) < len(ratios):
        raise InputError(f"ratios must be different from each other, and at least one, got {list(ratios)}.")
    jobs = [(destination(Path(out) / str(ratio)), dataclasses.replace(config, ratio=ratio)) for ratio in ratios]
    ranks = Ranks(group)
    with ranks.one_log():
        return prune_all(model, jobs, overwrite, resume, progress, command, ranks)


@share_cores()
def prune_model(
    model: PreTrainedModel,
    tokenizer_or_token_ids: PreTrainedTokenizerBase | torch.Tensor,
    config: PruneConfig,
    *,
    progress: ProgressCallback | None = None,
    group: ProcessGroup | None = None,
) -> PruneReport:
    """Prune a model in memory, in place: its layers shrink and its class becomes that of the format of the result.

    Afterwards it can generate, be trained, and be saved by `save_pretrained` like any other model.

    Args:
        model: A causal language model of a supported family, on one device.
        tokenizer_or_token_ids: A tokenizer for the calibration text, or the calibration windows themselves, (samples,
            seq_len) int64.
        config: The settings, without `dtype`, `compute_dtype`, `device` and memory budgets: the model keeps its own.
        progress, group: As for `prune`; every process of a group has a copy of the model, and all prune it alike.

    Raises:
        ValueError: (as InputError) the input is wrong; the model is then untouched, unless its hidden states overflow its
            dtype, or another process of the group is lost, after some layers have been pruned.
        TypeError: an argument has the wrong type.
    """
    started = time.perf_counter()
    ranks = Ranks(group)
    with ranks.one_log(), ranks.together():
        run = _prepare(model, tokenizer_or_token_ids, config, started, ranks)
    source = run.source
    compare_identities(identity_in_memory(source, run.calibration, run.plan.config), ranks)
    training = model.training
    model.eval()

    with ranks.one_log():
        try:
            context = run.context(progress)
            dense = run.dense_pass(context, None)
            allocated, output = run.allocate(dense)
            pruning = Pruning(context, dense, allocated.removals)
            for pruned in pruning:
                tensors = output.complete(pruned.layer.tensors, source.spec)
                pruned.parameters = sum(tensor.numel() for tensor in tensors.values())
        finally:
            model.train(training)
        convert_in_place(model, output, source.spec)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        name = model.config.name_or_path or type(model).__name__
        return run.report(pruning, allocated, output, name, None, parameters)


def _prepare(
    model: PreTrainedModel, given: PreTrainedTokenizerBase | torch.Tensor, config: PruneConfig, started: float, ranks: Ranks
) -> Run:
    """Check the arguments of `prune_model`, and set up the run."""
    check_config(config)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}; to prune a folder, use prune().")
    for name in ("dtype", "compute_dtype", "device", "host_memory", "gpu_memory"):
        if getattr(config, name) is not None:
            raise InputError(f"{name} does not apply to a model in memory, which keeps its own; leave it out.")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or any(device.type == "meta" for device in devices) or getattr(model, "is_quantized", False):
        raise InputError(
            "The model must be unquantised and wholly on one device, "
            f"got weights on {', '.join(sorted(map(str, devices)))}; prune its folder with prune() instead."
        )
    source = InMemoryModel(model)
    if isinstance(given, torch.Tensor):
        config = dataclasses.replace(config, calibration=given)
    (config,) = fit_programs([config], source)
    tokenizer = None if isinstance(given, torch.Tensor) else given
    samples = samples_for(config, tokens_to_fit(source.sizes(), source.config))
    calibration = calibration_windows(config, tokenizer, source.config, samples)
    memory.warm_up(source.device)
    return Run(source, calibration, config, started, memory.resident_gib() * GIB, ranks=ranks)
