"""`prune` for a model on disk and `prune_model` for one in memory: set up, run the layer loop, hand over the result."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimllm import memory, ops
from slimllm.allocation import Allocation
from slimllm.calibration import calibration_name, calibration_windows
from slimllm.checkpoint import Checkpoint, open_checkpoint
from slimllm.config import DTYPES, PruneConfig, check_config, parse_device
from slimllm.errors import InputError
from slimllm.families import layer_spec
from slimllm.layer import Layer
from slimllm.modelcard import write_model_card
from slimllm.native import OutputFormat, convert_in_place, output_format, write_config
from slimllm.pipeline import Outcome, batch_windows, perplexity_windows, prune_layers
from slimllm.progress import ProgressCallback, Stopwatch
from slimllm.report import PruneReport, versions
from slimllm.source import CheckpointModel, InMemoryModel, ModelSource
from slimllm.writer import CheckpointWriter, check_destination, check_space

Notice = Callable[[str], None]
_OPERATIONS = ("gram_", "head_covariance", "pearson_greedy", "token_cosine")  # those with kernels that a run uses


def prune(
    model: str | Path | Checkpoint,
    out: str | Path,
    config: PruneConfig,
    *,
    overwrite: bool = False,
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
        progress: Told about every layer that is done, see `ProgressCallback`.
        notice: Told, in sentences, what is worth knowing about the run.
        command: The command line, for the model card; None: the equivalent Python call.

    Returns:
        The report, which is also written to `out`/report.json.

    Raises:
        ValueError: (as InputError) something about the input is wrong; `out` is then untouched.
    """
    started = time.perf_counter()
    check_config(config)
    notice = notice or (lambda sentence: None)
    out = Path(out).expanduser().resolve()
    device = parse_device(config.device)
    ops.backend(device, _OPERATIONS)  # refuses what cannot be had before anything is read
    inputs = [model.path if isinstance(model, Checkpoint) else Path(model).expanduser()]
    if isinstance(config.calibration, (str, Path)):
        inputs.append(Path(config.calibration).expanduser())
    check_destination(out, inputs, overwrite)
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    name = checkpoint.name if checkpoint is model else str(model)
    dtype = DTYPES[config.dtype] if config.dtype else None
    source = CheckpointModel(checkpoint, device, _compute_dtype(config, checkpoint, device))
    if source.unexpected:
        first, number = source.unexpected[0], len(source.unexpected)
        notice(f"{number} tensors of the checkpoint have no place in the model and are left out ({first}, …).")
    check_space(out, _bytes_to_write(source, dtype))
    tokenizer = None if isinstance(config.calibration, torch.Tensor) else checkpoint.tokenizer()
    token_ids = calibration_windows(config, tokenizer, source.config, notice)
    run = _Run(source, token_ids, config, notice, started)

    def cast(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype or checkpoint.storage_dtype(name))

    with CheckpointWriter(out, num_shards=source.num_layers + 1, overwrite=overwrite) as writer:

        def store(index: int, layer: Layer) -> int:
            tensors = run.format.complete(layer.tensors, source.spec)
            prefix = source.layer_prefix(index)
            writer.write_shard(index + 1, {prefix + name: cast(prefix + name, t) for name, t in tensors.items()})
            return sum(tensor.numel() for tensor in tensors.values())

        outcome = run.prune(store, progress)
        with run.watch("write"):
            # One by one, so that only one of the large matrices is in memory as it was read.
            others = {name: cast(name, checkpoint.read([name])[name]) for name in source.other_tensors()}
            writer.write_shard(source.num_layers + 1, others)
            del others
            write_config(run.format.config, writer.folder)
            checkpoint.write_companions(writer.folder)
        report = run.report(outcome, name, str(out), writer.num_parameters)
        write_model_card(report, writer.folder, command or f"slimllm.prune({name!r}, {str(out)!r}, {config})")
        report.elapsed_s = run.elapsed_s()
        report.save(writer.folder)
        writer.finish()
    return report


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
        config: The settings; `dtype`, `compute_dtype` and `device` do not apply, the model's own do.

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
    for name in ("dtype", "compute_dtype", "device"):
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
    run = _Run(source, calibration_windows(config, tokenizer, source.config, notice), config, notice, started)
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


class _Run:
    """One run: the clocks, the account of memory, and the format, which is settled when the budgets are."""

    def __init__(
        self,
        source: ModelSource,
        token_ids: torch.Tensor,
        config: PruneConfig,
        notice: Notice,
        started: float,
    ) -> None:
        self.source, self.token_ids, self.config, self.notice = source, token_ids, config, notice
        self.watch = Stopwatch(source.device)
        self.backend = ops.backend(source.device, _OPERATIONS)
        self.format: OutputFormat
        self.sizes = source.sizes()
        self.parameters_before = sum(torch.Size(shape).numel() for shape in source.shapes().values())
        self.account = memory.account(
            source.config, self.sizes, token_ids.numel(), batch_windows(token_ids, config) * token_ids.shape[1],
            source.head_dim, source.dtype, config.recovery,
        )  # fmt: skip
        memory.warm_up(source.device)
        memory.reset_peak(source.device)
        self.runtime_gib = memory.resident_gib()
        self.started = time.perf_counter()
        self.setup_s = self.started - started

    def elapsed_s(self) -> float:
        return time.perf_counter() - self.started

    def prune(self, store: Callable[[int, Layer], int], progress: ProgressCallback | None) -> Outcome:
        return prune_layers(self.source, self.token_ids, self.config, self.watch, self._settle, store, progress)

    def _settle(self, allocation: Allocation) -> None:
        for note in allocation.notes:
            self.notice(f"{note}.")
        new_bias = self.config.recovery != "none"
        sizes = [
            size.without(budget.units, budget.channels, self.config.head_unit, new_bias)
            for size, budget in zip(self.sizes, allocation.budgets)
        ]
        dtype = DTYPES[self.config.dtype] if self.config.dtype else _config_dtype(self.source)
        self.format = output_format(self.source.config, sizes, dtype)

    def report(self, outcome: Outcome, model: str, out: str | None, parameters_after: int) -> PruneReport:
        source, config, allocation = self.source, self.config, outcome.allocation
        layers_before = sum(size.params for size in self.sizes)
        layers_after = sum(layer["parameters_after"] for layer in outcome.layers)
        for note in (added := allocation.note_of_biases(layers_before, layers_after, self.format.name)):
            self.notice(f"{note}.")
        before, windows = self.parameters_before, perplexity_windows(self.token_ids)
        return PruneReport(
            model=model,
            out=out,
            config=config.to_dict(),
            allocation={
                "target_params": allocation.target_params,
                "pruned_layers": allocation.pruned_layers,
                "alpha": allocation.alpha,
                "round_to": allocation.round_to,
                "notes": allocation.notes + added,
            },
            calibration={
                "text": calibration_name(config),
                "samples": self.token_ids.shape[0],
                "seq_len": self.token_ids.shape[1],
                "tokens": self.token_ids.numel(),
                "perplexity_tokens": windows * self.token_ids.shape[1],
                "perplexity_dense": _exp(outcome.loss_dense),
                "perplexity_pruned": _exp(outcome.loss_pruned),
            },
            parameters={
                "before": before,
                "after": parameters_after,
                "layers_before": layers_before,
                "layers_after": layers_after,
            },
            achieved_ratio=1 - layers_after / layers_before,
            achieved_ratio_model=1 - parameters_after / before,
            elapsed_s=self.elapsed_s(),
            setup_s=self.setup_s,
            dense_pass_s=outcome.dense_pass_s,
            stages_s=dict(self.watch.seconds),
            peak_host_gib=memory.peak_host_gib(),
            peak_gpu_gib=memory.peak_gpu_gib(source.device),
            memory_gib={"runtime": self.runtime_gib, **self.account},
            backend=self.backend,
            device=str(source.device),
            compute_dtype=str(source.dtype).removeprefix("torch."),
            format=self.format.name,
            versions=versions(),
            layers=outcome.layers,
        )


def _exp(loss: float) -> float:
    """Perplexity of a loss; a hopeless model's is capped, so that the report stays valid JSON."""
    return math.exp(min(loss, 700.0))


def _compute_dtype(config: PruneConfig, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    if config.compute_dtype:
        return DTYPES[config.compute_dtype]
    if device.type == "cpu":
        return torch.float32  # exact, and half precision is slow on many CPUs
    return _weight_dtype(checkpoint)


def _weight_dtype(checkpoint: Checkpoint) -> torch.dtype:
    return checkpoint.storage_dtype(f"{layer_spec(checkpoint.config.model_type).embedding}.weight")


def _config_dtype(source: ModelSource) -> torch.dtype:
    return _weight_dtype(source.checkpoint) if isinstance(source, CheckpointModel) else source.dtype


def _bytes_to_write(source: CheckpointModel, dtype: torch.dtype | None) -> int:
    """What the dense model would take on disk, an upper bound."""
    parameters = sum(torch.Size(shape).numel() for shape in source.shapes().values())
    return parameters * (dtype or _weight_dtype(source.checkpoint)).itemsize
