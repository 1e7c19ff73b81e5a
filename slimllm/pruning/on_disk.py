"""Pruning of a model on disk at one or several ratios: checks, runs on all ranks, and files, which the first one writes."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from slimllm import ops
from slimllm.calibration import calibration_windows, sources_of
from slimllm.checkpoints.base import Checkpoint
from slimllm.checkpoints.destination import check_destination, check_space
from slimllm.checkpoints.journal import begun_with, fingerprint
from slimllm.checkpoints.opening import open_checkpoint
from slimllm.checkpoints.output_format import OutputFormat, write_config
from slimllm.checkpoints.resume import Record
from slimllm.checkpoints.source import CheckpointModel
from slimllm.checkpoints.tokenizer import tokenizer_code
from slimllm.checkpoints.writer import (
    CheckpointWriter,
    bytes_beside,
    can_resume,
    check_interrupted,
    in_parts,
    partial_folder,
    remove_leftover,
)
from slimllm.checks import GIB, parse_device, torch_dtype
from slimllm.config import PruneConfig
from slimllm.pruning.dense_pass import DensePass
from slimllm.pruning.identity import WEIGHTS, checksum_of, compare_identities, environment_of, identity_of
from slimllm.pruning.model_card import write_model_card
from slimllm.pruning.pipeline import PrunedLayer, Pruning
from slimllm.pruning.programs import fit_programs
from slimllm.pruning.report import REPORT_NAME, PruneReport
from slimllm.pruning.run import Run, operations_of, weight_dtype
from slimllm.pruning.shapes import check_settings, samples_for, tokens_to_fit
from slimllm.runtime import memory
from slimllm.runtime.cores import share_cores
from slimllm.runtime.distributed import Ranks
from slimllm.runtime.progress import ProgressCallback

_log = logging.getLogger("slimllm")


@share_cores()
def prune_all(
    model: str | Path | Checkpoint,
    jobs: list[tuple[Path, PruneConfig]],
    overwrite: bool,
    resume: bool,
    progress: ProgressCallback | None,
    command: str | None,
    ranks: Ranks,
    on_report: Callable[[PruneReport, Path], None] | None = None,
) -> list[PruneReport]:
    """Make a result for each job, a folder and settings; all jobs have the same calibration and devices.

    See `slimllm.prune_ratios`. `on_report` is called with each result as soon as it is complete.
    """
    assert len({job[1].preset == "paper" for job in jobs}) == 1, "the preset paper draws windows of its own"
    started = time.perf_counter()
    config = jobs[0][1]
    inputs = [model.path if isinstance(model, Checkpoint) else Path(model).expanduser()]
    inputs += [Path(text.name).expanduser() for text in sources_of(config.calibration) if text.name is not None]
    name = model.name if isinstance(model, Checkpoint) else str(model)
    maybe_complete = []
    with ranks.together():
        device = parse_device(config.device)
        ops.backend(device, operations_of(device))  # refuses an unavailable backend before anything is read
        for out, _ in jobs if ranks.first else []:
            in_place = check_interrupted(out, resume)  # True: only the journal remains to be removed
            if resume and not can_resume(out) and (out / REPORT_NAME).is_file():
                maybe_complete.append(out)
            else:
                check_destination(out, inputs, overwrite or in_place)
        checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
        source = CheckpointModel(checkpoint, device, _compute_dtype(config, checkpoint, device))
        fitted = fit_programs([wanted for _, wanted in jobs], source)
        jobs = [(out, wanted) for (out, _), wanted in zip(jobs, fitted)]
        for _, wanted in jobs:
            check_settings(source, wanted)
        for sentence in checkpoint.left_out():
            _log.info(sentence)
        tokenizer = None if isinstance(config.calibration, torch.Tensor) else checkpoint.tokenizer()
        if tokenizer and (code := tokenizer_code(checkpoint.path)):
            _log.warning("The tokenizer's own Python code (%s) is not run; its tokenizer.json is used without it.", code)
        tokens = tokens_to_fit(source.sizes(), source.config)
        samples = max(samples_for(wanted, tokens) for _, wanted in jobs)  # all have the same windows
        calibration = calibration_windows(config, tokenizer, source.config, samples)
    memory.warm_up(device)
    runtime = max(ranks.everyone(memory.resident_gib() * GIB))
    reports: list[PruneReport] = []
    dense = None
    for out, wanted in jobs:
        begun = ranks.tell(begun_with(partial_folder(out)) if ranks.first else None)
        with ranks.together():
            run = Run(source, calibration, wanted, started, runtime, partial_folder(out), begun, ranks)
        if dense and not dense.serves(run.context(None)):
            dense = None
        if len(jobs) > 1:
            _log.info("Ratio %s%s:", wanted.ratio, ", with the same dense pass" if dense else "")
        if ranks.tell(out in maybe_complete) and (report := _complete(run, out, inputs, overwrite)):
            if ranks.first:
                remove_leftover(out)
            _log.info("%s is complete already.", out)
            reports.append(report)
            if on_report:
                on_report(report, out)
            continue
        report, dense = _prune_one(run, name, out, overwrite, resume, progress, command, dense)
        assert report is not None  # it is written
        reports.append(report)
        if on_report:
            on_report(report, out)
        started = time.perf_counter()
    return reports


def _complete(run: Run, out: Path, inputs: list[Path], overwrite: bool) -> PruneReport | None:
    """Return the report in a folder if the model there is this run's result; otherwise check that it can be replaced."""
    source, ranks = run.source, run.ranks
    assert isinstance(source, CheckpointModel)
    with ranks.together():
        checksums = [fingerprint(source.weights(index)) for index in ranks.share(source.num_layers)]
    weights = checksum_of([checksum for share in ranks.everyone(checksums) for checksum in share])
    report = None
    with ranks.together():
        if ranks.first:
            report = PruneReport.read(out)
            if report.identity != identity_of(source, run.calibration, run.plan) | {WEIGHTS: weights}:
                check_destination(out, inputs, overwrite)
                report = None
    return _told(report, ranks)


def _prune_one(
    run: Run,
    name: str,
    out: Path,
    overwrite: bool,
    resume: bool,
    progress: ProgressCallback | None,
    command: str | None,
    dense: DensePass | None,
) -> tuple[PruneReport | None, DensePass | None]:
    """Prune and write one result; return its report and the dense pass, which the next job may use."""
    config, source, ranks = run.config, run.source, run.ranks
    assert isinstance(source, CheckpointModel)
    checkpoint, dtype = source.checkpoint, torch_dtype(config.dtype) if config.dtype else None
    beside = in_parts(checkpoint)
    writer: CheckpointWriter | None = None

    def cast(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype or checkpoint.storage_dtype(name))

    def write(pruned: PrunedLayer, output: OutputFormat) -> None:
        tensors = output.complete(pruned.layer.tensors, source.spec)
        prefix = source.layer_prefix(pruned.index)
        if writer:
            shard = {checkpoint.stored_as(prefix + name): cast(prefix + name, t) for name, t in tensors.items()}
            writer.write_shard(pruned.index + 1, shard)
        pruned.parameters = sum(tensor.numel() for tensor in tensors.values())

    with ranks.together():
        identity = identity_of(source, run.calibration, run.plan)
    compare_identities(identity, ranks)
    with ExitStack() as stack:
        with ranks.together():
            if ranks.first:
                environment = environment_of(source.device, ranks.size)
                number = source.num_layers + 1 + len(beside)
                writer = CheckpointWriter(out, number, overwrite, identity, environment)
                stack.enter_context(writer)
        record = Record(writer.journal if writer else None, ranks)
        report = None
        if record.done("finished"):
            with ranks.together():
                if writer:
                    writer.finish()
                    report = PruneReport.read(out)
            return _told(report, ranks), dense
        with ranks.together():
            if writer and record.steps:
                run.resume(writer.journal)
                for index in range(len(record.done("prune"))):
                    writer.adopt_shard(index + 1)
            elif resume:
                _log.info("Nothing to resume; starting from scratch.")
            if writer:
                check_space(out, round(sum(run.plan.disk.values())) + bytes_beside(checkpoint) - writer.bytes_there)
        context, shared = run.context(progress, record), dense is not None
        dense = run.dense_pass(context, dense)
        allocated, output = run.allocate(dense)
        pruning = Pruning(context, dense, allocated.removals)
        for pruned in pruning:
            with run.watch("write"), ranks.together():
                write(pruned, output)
            del pruned  # before the next layer is read
        with ranks.together():
            if writer:
                with run.watch("write"):
                    # One by one, so that only one large matrix at a time is in memory in the dtype that was read.
                    others = {
                        checkpoint.stored_as(name): cast(name, checkpoint.read([name])[name])
                        for name in source.other_tensors()
                    }
                    writer.write_shard(source.num_layers + 1, others)
                    del others
                    for number, names in enumerate(beside, source.num_layers + 2):
                        writer.write_shard(number, checkpoint.read(names))
                    write_config(output.config, writer.folder, checkpoint)
                    checkpoint.write_companions(writer.folder)
                report = run.report(pruning, allocated, output, name, str(out), writer.num_parameters)
                report.dense_pass_shared = shared
                report.dense_stage_s = dense.stage_seconds
                report.identity = identity | {WEIGHTS: checksum_of([layer.weights for layer in dense.layers])}
                write_model_card(report, writer.folder, command or f"slimllm.prune({name!r}, {str(out)!r}, {config})")
                report.elapsed_s = run.watch.elapsed_s()
                report.save(writer.folder)
                writer.complete()
                writer.finish()
    return _told(report, ranks), dense


def _told(report: PruneReport | None, ranks: Ranks) -> PruneReport | None:
    """Return the first rank's report, if there is one, on all ranks."""
    fields = ranks.tell(report and dataclasses.asdict(report))
    return report or (PruneReport(**fields) if fields else None)


def _compute_dtype(config: PruneConfig, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    if config.compute_dtype:
        return torch_dtype(config.compute_dtype)
    if device.type == "cpu":
        return torch.float32  # exact, and half precision is slow on many CPUs
    return weight_dtype(checkpoint)
