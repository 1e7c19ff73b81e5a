"""One training: checks, steps with saved states, and the merged result in the format of the model."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import shutil
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from slimllm.calibration import check_seq_len
from slimllm.checkpoints.destination import check_destination, check_space, destination
from slimllm.checkpoints.fused import FusedCheckpoint
from slimllm.checkpoints.journal import Journal, fingerprint
from slimllm.checkpoints.opening import open_checkpoint
from slimllm.checkpoints.source import CheckpointModel
from slimllm.checkpoints.writer import CheckpointWriter, can_resume, check_interrupted, remove_leftover
from slimllm.checks import parse_device
from slimllm.errors import HopelessError, InputError
from slimllm.evaluation.perplexity import load
from slimllm.finetuning.config import FinetuneConfig
from slimllm.finetuning.data import Example, read_examples
from slimllm.finetuning.report import FINETUNE_NAME, FinetuneReport, add_to_model_card
from slimllm.finetuning.train import Training
from slimllm.pruning.identity import checksum_of, environment_of, say_changes
from slimllm.pruning.report import REPORT_NAME, versions
from slimllm.runtime import memory
from slimllm.runtime.cores import share_cores
from slimllm.runtime.progress import PartWritten, ProgressCallback, StepTrained

_log = logging.getLogger("slimllm")


@share_cores()
def finetune(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    config: FinetuneConfig | None = None,
    *,
    teacher: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    trust_remote_code: bool = False,
    progress: ProgressCallback | None = None,
) -> FinetuneReport:
    """Train a model, pruned or not, by LoRA or on weights of its layers, and write it in its format.

    Args:
        model: A Hugging Face folder, such as one written by `prune`.
        data: A file of training examples, see `read_examples`.
        out: The folder to write. It appears only when it is complete.
        config: The settings; None: the defaults.
        teacher: A model with the same tokens, such as the one that was pruned: its next-token distributions are learnt
            instead of the labels, or beside them (`FinetuneConfig.labels`). It is held in memory as a whole.
        overwrite: Replace an existing model in `out`.
        resume: Resume the interrupted training, if there is one. The result is the same as without the interruption.
        trust_remote_code: Run Python code that comes with the model, such as its tokenizer's.
        progress: Called after every step (`StepTrained`) and, at the end, after every layer that is written
            (`PartWritten`). An exception that it raises stops the training there, with its state on the disk.

    Returns:
        The report, which is also written to `out`/finetune.json.

    Raises:
        ValueError: (as InputError) the input is wrong; (as OutputError) the disk is full or failed.
        TypeError: config is not a FinetuneConfig.
    """
    started = time.perf_counter()
    config = FinetuneConfig() if config is None else config
    if not isinstance(config, FinetuneConfig):
        raise TypeError(f"config must be a FinetuneConfig, got {type(config).__name__}.")
    if config.train == "lora" and importlib.util.find_spec("peft") is None:
        raise InputError(
            "LoRA needs peft, which is not installed; run pip install peft, or install this package with the extra "
            "finetune."
        )
    out, device = destination(out), parse_device(config.device)
    in_place = check_interrupted(out, resume)
    checkpoint = open_checkpoint(model)
    if checkpoint.path.is_file():
        raise InputError(f"{model} is a GGUF file; give the folder of a Hugging Face model, such as slimllm prune writes.")
    if checkpoint.container:
        raise InputError(f"{model} is a {checkpoint.container.model_type}; only language models are fine-tuned.")
    if isinstance(checkpoint, FusedCheckpoint):
        raise InputError(
            f"{model} combines several projections in one matrix; prune the model first, which separates them."
        )
    source = CheckpointModel(checkpoint, torch.device("cpu"), torch.float32)
    for sentence in checkpoint.left_out():
        _log.info(sentence)
    if source.spec.expert:
        raise InputError(
            f"{model} is a mixture of experts, whose training is not supported: it needs a loss that balances the experts."
        )
    if config.train == "lora" and config.rank > source.config.hidden_size:
        raise InputError(
            f"rank is {config.rank}, but the model's matrices have only {source.config.hidden_size} rows or columns; "
            "give a smaller rank."
        )
    examples, held_out = _examples(data, checkpoint.tokenizer(trust_remote_code), config, source)
    taught_by = _teacher(teacher, source, config)
    compute_dtype = config.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    identity = _identity(source, examples + held_out, config, compute_dtype)
    if taught_by:
        identity["teacher, by checksum"] = _checksum(taught_by)
    if resume and not can_resume(out) and (out / FINETUNE_NAME).is_file():
        report = FinetuneReport.read(out)
        if report.identity == json.loads(json.dumps(identity)):
            remove_leftover(out)
            _log.info("%s is complete already.", out)
            return report
    check_destination(out, [checkpoint.path, Path(data).expanduser()], overwrite or in_place)
    check_space(out, sum(path.stat().st_size for path in checkpoint.path.glob("*.safetensors")))
    with CheckpointWriter(out, source.num_layers + 1, overwrite, identity, environment_of(device, 1)) as writer:
        if writer.journal.done("finished"):
            writer.finish()
            return FinetuneReport.read(out)
        stored = compute_dtype if config.train == "lora" else "float32"
        loaded, _ = load(checkpoint.path, dtype=stored, device=config.device, trust_remote_code=trust_remote_code)
        parameters = sum(parameter.numel() for parameter in loaded.parameters())
        teaching = None
        if teacher is not None:
            teaching, _ = load(teacher, dtype=compute_dtype, device=config.device, trust_remote_code=trust_remote_code)
        outputs = (source.spec.o_proj, source.spec.down_proj)
        training = Training(loaded, source.spec.layers, examples, config, teaching, outputs, compute_dtype)
        if missing := sorted(training.tensors - set(source.shapes())):
            raise InputError(f"{missing[0]}, which would be trained, is not stored in {model}; prune the model first.")
        check_space(out, 24 * training.trainable)  # two states of a parameter and two moments
        memory.reset_peak(device)
        curve = _train(training, held_out, config, writer.journal, started, progress)
        _write(training, source, writer, progress)
        report = FinetuneReport(
            model=str(model),
            data=str(data),
            out=str(out),
            config=config.to_dict(),
            examples=len(examples),
            held_out_examples=len(held_out),
            trainable=training.trainable,
            parameters=parameters,
            **curve,
            peak_host_gib=memory.peak_host_gib(),
            peak_gpu_gib=memory.peak_gpu_gib(device),
            device=str(device),
            compute_dtype=compute_dtype,
            versions=versions(),
            identity=identity,
            teacher="" if teacher is None else str(teacher),
        )
        report.save(writer.folder)
        add_to_model_card(report, writer.folder)
        writer.complete()
        writer.finish()
    return report


def _examples(
    data: str | Path, tokenizer: PreTrainedTokenizerBase, config: FinetuneConfig, source: CheckpointModel
) -> tuple[list[Example], list[Example]]:
    """Return the examples to train on, and the held-out ones."""
    check_seq_len(config.seq_len, source.config)
    every = read_examples(data, tokenizer, config.seq_len)
    if max(max(example.ids) for example in every) >= source.config.vocab_size:
        raise InputError("The tokenizer has more tokens than the model's vocabulary; is it the tokenizer of this model?")
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(config.seed)).tolist()
    number = min(config.held_out, len(every) // 10)
    shuffled = [every[index] for index in order]
    return shuffled[: len(every) - number], shuffled[len(every) - number :]


def _identity(
    source: CheckpointModel, examples: list[Example], config: FinetuneConfig, compute_dtype: str
) -> dict[str, Any]:
    """Return everything that two trainings must have in common for one to resume the other."""
    settings = config.to_dict()
    del settings["device"], settings["dtype"]
    return {
        "slimllm": versions()["slimllm"],
        **settings,
        "compute_dtype": compute_dtype,
        "examples, by checksum": zlib.crc32(json.dumps([[example.given, *example.ids] for example in examples]).encode()),
        "model, by checksum": _checksum(source),
    }


def _checksum(source: CheckpointModel) -> int:
    """Return a checksum of all weights."""
    checksums = [fingerprint(source.weights(index)) for index in range(source.num_layers)]
    return checksum_of(checksums + [fingerprint(source.checkpoint.read([name])) for name in source.other_tensors()])


def _teacher(teacher: str | Path | None, source: CheckpointModel, config: FinetuneConfig) -> CheckpointModel | None:
    """Return the teacher's checkpoint, after checking that it can teach this model; None: there is none."""
    if teacher is None:
        if config.labels:
            raise InputError(
                f"labels is {config.labels}, the labels' share beside a teacher; give a teacher, or leave it out."
            )
        return None
    found = CheckpointModel(open_checkpoint(teacher), torch.device("cpu"), torch.float32)
    if found.config.vocab_size != source.config.vocab_size:
        raise InputError(
            f"The teacher {teacher} has {found.config.vocab_size} tokens and the model {source.config.vocab_size}; give "
            "the model that was pruned, or another one with the same tokenizer."
        )
    check_seq_len(config.seq_len, found.config)
    return found


def _train(
    training: Training,
    held_out: list[Example],
    config: FinetuneConfig,
    journal: Journal,
    started: float,
    progress: ProgressCallback | None,
) -> dict[str, Any]:
    """Do all remaining steps, and return the curve as fields of the report."""
    curve: dict[str, Any] = {"loss": [], "held_out": [], "tokens": 0, "elapsed_s": 0.0}
    if steps := journal.done("train"):
        training.restore(journal.state(), len(steps[-1]["loss"]))
        curve = {name: steps[-1][name] for name in curve}
        started -= curve["elapsed_s"]
        _log.info("Resuming after step %d of %d.", training.done, training.num_steps)
        say_changes(journal, training.device, 1)
    elif held_out:
        curve["held_out"].append([0, training.mean_loss(held_out)])

    def record() -> None:
        curve["elapsed_s"] = time.perf_counter() - started
        journal.record("train", training.state(), **copy.deepcopy(curve))  # written in parallel with the next steps

    while training.done < training.num_steps:
        loss, tokens = training.step()
        curve["loss"].append(loss)
        curve["tokens"] += tokens
        save = training.done % config.save_every == 0 or training.done == training.num_steps
        if save:
            if held_out:
                curve["held_out"].append([training.done, training.mean_loss(held_out)])
            record()
        try:
            if progress:
                progress(StepTrained(training.done, training.num_steps, loss))
        except BaseException:
            if not save:
                record()
            raise
    return curve


def _write(
    training: Training, source: CheckpointModel, writer: CheckpointWriter, progress: ProgressCallback | None
) -> None:
    """Write the model's files with the weights that were trained."""
    checkpoint = source.checkpoint
    for index in range(source.num_layers):
        prefix, tensors = source.layer_prefix(index), {}
        for name, tensor in source.weights(index).items():
            if prefix + name in training.tensors:
                tensor = training.value(prefix + name, tensor).to(tensor.dtype)
                if not bool(tensor.isfinite().all()):
                    raise HopelessError(f"{prefix}{name} is not finite after training; give a smaller learning_rate.")
            tensors[prefix + name] = tensor
        writer.write_shard(index + 1, tensors)
        if progress:
            progress(PartWritten(index + 1, source.num_layers))
    writer.write_shard(source.num_layers + 1, checkpoint.read(source.other_tensors()))
    checkpoint.write_companions(writer.folder)
    for file in (
        *checkpoint.path.glob("*.py"),
        *(checkpoint.path / name for name in ("config.json", "README.md", REPORT_NAME)),
    ):
        if file.is_file():
            shutil.copyfile(file, writer.folder / file.name)
