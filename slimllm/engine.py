"""`prune` for a model on disk and `prune_model` for one in memory: set up, run the layer loop, hand over the result."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimllm import ops
from slimllm.calibration import calibration_windows
from slimllm.checkpoint import Checkpoint, open_checkpoint
from slimllm.config import DTYPES, PruneConfig, check_config, parse_device
from slimllm.errors import InputError
from slimllm.layer import Layer
from slimllm.modelcard import write_model_card
from slimllm.native import convert_in_place, write_config
from slimllm.pipeline import DensePass
from slimllm.progress import ProgressCallback
from slimllm.report import REPORT_NAME, PruneReport
from slimllm.run import (
    OPERATIONS,
    WEIGHTS,
    Notice,
    Run,
    checksum_of,
    environment_of,
    identity_of,
    weight_dtype,
    weights_of,
)  # fmt: skip
from slimllm.source import CheckpointModel, InMemoryModel
from slimllm.writer import CheckpointWriter, can_resume, check_destination, check_interrupted, check_space, partial_folder


def prune(
    model: str | Path | Checkpoint,
    out: str | Path,
    config: PruneConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: ProgressCallback | None = None,
    notice: Notice | None = None,
    command: str | None = None,
) -> PruneReport:
    """Prune a model on disk, one layer in memory at a time, and write the result as a Hugging Face folder.

    Args:
        model: A Hugging Face folder, a GGUF file, a hub id, or what `open_checkpoint` made of one.
        out: The folder to make. It appears when it is complete.
        config: The settings.
        overwrite: Replace a model that is in `out` already.
        resume: Go on with the run that was interrupted, if one was: the files become what they would have been.
        progress: Told about every layer that is done, see `ProgressCallback`; an exception of its stops the run there.
        notice: Told, in sentences, what is worth knowing about the run.
        command: The command line, for the model card; None: the equivalent Python call.

    Returns:
        The report, which is also written to `out`/report.json.

    Raises:
        ValueError: (as InputError) something about the input is wrong, or an interrupted run of other settings, another
            model or text is to be resumed; `out` is then untouched. (as OutputError, one of those) the disk is full or
            failed; the run can be resumed.
    """
    check_config(config)
    jobs = [(Path(out).expanduser().resolve(), config)]
    return _prune_all(model, jobs, overwrite, resume, progress, notice, command)[0]


def prune_ratios(
    model: str | Path | Checkpoint,
    out: str | Path,
    config: PruneConfig,
    ratios: Sequence[float],
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: ProgressCallback | None = None,
    notice: Notice | None = None,
    command: str | None = None,
) -> list[PruneReport]:
    """`prune` at several ratios, one after the other; `out`/0.2, `out`/0.35, … are what single runs would have written.

    What they have in common is done once: opening the model, the calibration windows, and the dense pass, which weighs the
    layers and depends on no ratio. From the first pruned layer on their activations differ, and nothing can be shared.

    Args:
        model, overwrite, resume, progress, notice, command: As for `prune`; with `resume`, what is complete is left.
        out: The folder to make the results in; it may exist.
        config: The settings; `ratio` does not apply.
        ratios: The ratios, all different.

    Returns:
        The reports, in the order of the ratios.

    Raises:
        ValueError: (as InputError) as `prune`, or a ratio is given twice, or none.
    """
    check_config(config)
    if not ratios or len(set(ratios)) < len(ratios):
        raise InputError(f"ratios must be different from each other, and one at least, got {list(ratios)}.")
    jobs = [
        (Path(out).expanduser().resolve() / str(ratio), dataclasses.replace(config, ratio=ratio)) for ratio in ratios
    ]  # fmt: skip
    return _prune_all(model, jobs, overwrite, resume, progress, notice, command)


def _prune_all(
    model: str | Path | Checkpoint, jobs: list[tuple[Path, PruneConfig]], overwrite: bool, resume: bool,
    progress: ProgressCallback | None, notice: Notice | None, command: str | None,
) -> list[PruneReport]:  # fmt: skip
    """One result for each job, a folder and settings that differ in the ratio alone."""
    started = time.perf_counter()
    notice = notice or (lambda sentence: None)
    config = jobs[0][1]
    device = parse_device(config.device)
    ops.backend(device, OPERATIONS)  # refuses what cannot be had before anything is read
    inputs = [model.path if isinstance(model, Checkpoint) else Path(model).expanduser()]
    if isinstance(config.calibration, (str, Path)):
        inputs.append(Path(config.calibration).expanduser())
    name = model.name if isinstance(model, Checkpoint) else str(model)
    maybe_complete = []
    for out, _ in jobs:
        in_place = check_interrupted(out, resume)  # and only the journal is left to be removed
        if resume and not can_resume(out) and (out / REPORT_NAME).is_file():
            maybe_complete.append(out)
        else:
            check_destination(out, inputs, overwrite or in_place)
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    source = CheckpointModel(checkpoint, device, _compute_dtype(config, checkpoint, device))
    if source.unexpected:
        first, number = source.unexpected[0], len(source.unexpected)
        notice(f"{number} tensors of the checkpoint have no place in the model and are left out ({first}, …).")
    tokenizer = None if isinstance(config.calibration, torch.Tensor) else checkpoint.tokenizer()
    token_ids = calibration_windows(config, tokenizer, source.config, notice)
    reports, dense = [], None
    for out, wanted in jobs:
        if len(jobs) > 1:
            notice(f"Ratio {wanted.ratio}{', with the same dense pass' if dense else ''}:")
        run = Run(source, token_ids, wanted, notice, started, partial_folder(out))
        if out in maybe_complete:
            found = PruneReport.read(out)
            if found.identity == identity_of(source, token_ids, run.plan) | {WEIGHTS: weights_of(source)}:
                notice(f"{out} is complete already.")
                reports.append(found)
                continue
            check_destination(out, inputs, overwrite)
        report, dense = _prune_one(run, name, out, overwrite, resume, progress, command, dense)
        reports.append(report)
        started = time.perf_counter()
    return reports


def _prune_one(
    run: Run, name: str, out: Path, overwrite: bool, resume: bool, progress: ProgressCallback | None, command: str | None,
    dense: DensePass | None,
) -> tuple[PruneReport, DensePass | None]:  # fmt: skip
    """Prune and write one result; the dense pass, which the next one may use."""
    config, source = run.config, run.source
    assert isinstance(source, CheckpointModel)
    checkpoint, dtype = source.checkpoint, DTYPES[config.dtype] if config.dtype else None
    identity, environment = identity_of(source, run.token_ids, run.plan), environment_of(source.device)
    writer = CheckpointWriter(out, source.num_layers + 1, overwrite, identity, environment)

    def cast(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype or checkpoint.storage_dtype(name))

    def store(index: int, layer: Layer) -> int:
        tensors = run.format.complete(layer.tensors, source.spec)
        prefix = source.layer_prefix(index)
        writer.write_shard(index + 1, {prefix + name: cast(prefix + name, t) for name, t in tensors.items()})
        return sum(tensor.numel() for tensor in tensors.values())

    with writer:
        journal = writer.journal
        if journal.done("finished"):
            writer.finish()
            return PruneReport.read(out), dense
        if journal.steps:
            run.go_on(journal)
            for index in range(len(journal.done("prune"))):
                writer.adopt_shard(index + 1)
        elif resume:
            run.notice("There is no interrupted run to go on with; this one starts at the beginning.")
        check_space(out, round(sum(run.plan.disk.values())) - writer.total_size)
        outcome = run.prune(store, progress, journal, dense)
        with run.watch("write"):
            # One by one, so that only one of the large matrices is in memory as it was read.
            others = {name: cast(name, checkpoint.read([name])[name]) for name in source.other_tensors()}
            writer.write_shard(source.num_layers + 1, others)
            del others
            write_config(run.format.config, writer.folder)
            checkpoint.write_companions(writer.folder)
        report = run.report(outcome, name, str(out), writer.num_parameters)
        report.dense_pass_shared = dense is not None
        report.identity = identity | {WEIGHTS: checksum_of([layer["weights"] for layer in outcome.dense.layers])}
        write_model_card(report, writer.folder, command or f"slimllm.prune({name!r}, {str(out)!r}, {config})")
        report.elapsed_s = run.watch.elapsed_s()
        report.save(writer.folder)
        writer.complete()
        writer.finish()
    return report, outcome.dense


def prune_model(
    model: PreTrainedModel,
    tokenizer_or_token_ids: PreTrainedTokenizerBase | torch.Tensor,
    config: PruneConfig,
    *,
    progress: ProgressCallback | None = None,
    notice: Notice | None = None,
) -> PruneReport:
    """Prune a model in memory, in place: its layers shrink and its class becomes that of the native format.

    Afterwards it generates, trains and, with `save_pretrained`, saves as any other model.

    Args:
        model: A causal language model of a supported family, on one device.
        tokenizer_or_token_ids: What turns the calibration text into token ids, or the windows themselves, (samples,
            seq_len) int64.
        config: The settings; `dtype`, `compute_dtype`, `device` and budgets of memory do not apply: the model has its own.

    Raises:
        ValueError: (as InputError) something about the input is wrong; the model is then untouched, unless its hidden
            states overflow its dtype after some layers have been pruned.
        TypeError: an argument has the wrong type.
    """
    started = time.perf_counter()
    check_config(config)
    notice = notice or (lambda sentence: None)
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
    given = tokenizer_or_token_ids
    if isinstance(given, torch.Tensor):
        config = dataclasses.replace(config, calibration=given)
    tokenizer = None if isinstance(given, torch.Tensor) else given
    run = Run(source, calibration_windows(config, tokenizer, source.config, notice), config, notice, started)
    training = model.training
    model.eval()

    def store(index: int, layer: Layer) -> int:
        return sum(tensor.numel() for tensor in run.format.complete(layer.tensors, source.spec).values())

    try:
        outcome = run.prune(store, progress)
    finally:
        model.train(training)
    convert_in_place(model, run.format, source.spec)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return run.report(outcome, model.config.name_or_path or type(model).__name__, None, parameters)


def _compute_dtype(config: PruneConfig, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    if config.compute_dtype:
        return DTYPES[config.compute_dtype]
    if device.type == "cpu":
        return torch.float32  # exact, and half precision is slow on many CPUs
    return weight_dtype(checkpoint)
