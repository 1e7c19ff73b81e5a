"""One run: its inputs, its clocks, its memory estimate and its report."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from slimllm import ops
from slimllm.calibration import Calibration, calibration_name
from slimllm.checkpoints.base import Checkpoint
from slimllm.checkpoints.journal import Journal
from slimllm.checkpoints.output_format import OutputFormat, biases_of, output_format
from slimllm.checkpoints.resume import Record
from slimllm.checkpoints.source import CheckpointModel, ModelSource
from slimllm.checks import GIB, torch_dtype
from slimllm.config import PruneConfig
from slimllm.errors import InputError
from slimllm.methods.allocation.removal import LayerRemoval
from slimllm.methods.allocation.spending import Curves
from slimllm.methods.allocation.target import Allocated, allocate
from slimllm.methods.statistics import Needs
from slimllm.models.families import family_of
from slimllm.models.slicing import LayerSizes
from slimllm.ops import dispatch
from slimllm.pruning.context import RunContext
from slimllm.pruning.dense_pass import DensePass, run_dense_pass, steps_of
from slimllm.pruning.identity import say_changes
from slimllm.pruning.layer_report import notes_of_experts
from slimllm.pruning.memory_estimate import sizes_of
from slimllm.pruning.pipeline import Pruning
from slimllm.pruning.plan import GPU_RUNTIME, Plan, make_plan
from slimllm.pruning.report import PruneReport, versions
from slimllm.pruning.residual_stream import perplexity_windows
from slimllm.pruning.shapes import check_settings, layer_shapes, tokens_to_fit
from slimllm.pruning.tensor_parallel import tensor_parallel_sizes
from slimllm.runtime import memory
from slimllm.runtime.distributed import Ranks
from slimllm.runtime.progress import ProgressCallback
from slimllm.runtime.stopwatch import Stopwatch

_log = logging.getLogger("slimllm")

OPERATIONS = (
    "gram_",
    "head_covariance",
    "head_covariance_of_tokens",
    "pearson_greedy",
    "token_cosine",
)  # operations with kernels that every run uses


def operations_of(device: torch.device) -> tuple[str, ...]:
    """Return the operations with kernels that a run on a device may use."""
    return OPERATIONS if device.type == "cpu" else (*OPERATIONS, "greedy_elimination")


class Run:
    """One run: its model, its windows, its clocks and its memory estimate."""

    def __init__(
        self,
        source: ModelSource,
        calibration: Calibration,
        config: PruneConfig,
        started: float,
        runtime: float,
        folder: Path | None = None,
        begun: dict[str, Any] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        token_ids, held_out = calibration.token_ids, len(calibration.held_out)
        if len(token_ids) < self.ranks.size:
            raise InputError(
                f"{len(token_ids)} calibration windows cannot be shared by {self.ranks.size} processes; give more samples, "
                "or start fewer processes."
            )
        assert config.bias != "auto", "the program that the result is for decides it (fit_programs)"
        check_settings(source, config)
        self.source, self.config = source, config
        self.calibration, self.token_ids = calibration, token_ids
        dispatch.forget()
        self.backend = ops.backend(source.device, operations_of(source.device))
        self.sizes = source.sizes()
        self.parameters_before = sum(torch.Size(shape).numel() for shape in source.shapes().values())
        self.parameters_before += sum(torch.Size(shape).numel() for shape in source.beside().values())
        memory.reset_peak(source.device)
        self.plan = plan_of(source, (*token_ids.shape, held_out), config, runtime, folder, begun, self.ranks.size)
        for choice in self.plan.choices:
            _log.info("To fit the budget, %s.", choice)
        self._say_if_few(token_ids)
        self.watch = Stopwatch(source.device)
        self.setup_s = time.perf_counter() - started
        self.resumed_steps = 0

    def resume(self, journal: Journal) -> None:
        """Continue the clocks from the end of the journal, and warn if the environment has changed."""
        last = journal.steps[-1]
        self.resumed_steps = len(journal.steps)
        self.watch.resume(last["seconds"], last["elapsed_s"])
        done = len(journal.done("prune")) or len(journal.done("dense"))
        _log.info("Resuming after layer %d of the %s.", done - 1, "pruning" if journal.done("prune") else "dense pass")
        say_changes(journal, self.source.device, self.ranks.size)

    def context(self, progress: ProgressCallback | None, record: Record | None = None) -> RunContext:
        """Return the context that the passes of this run need."""
        return RunContext(
            self.source, self.calibration, self.plan.config, self.plan.placement, self.watch, self.ranks, record, progress
        )

    def dense_pass(self, context: RunContext, made: DensePass | None) -> DensePass:
        """Run the dense pass, or adopt `made`, the dense pass of another run that `serves` these settings."""
        if made is None:
            return run_dense_pass(context)
        if record := context.record:
            record.compare_weights(lambda index: made.layers[index].weights)
            adopted = steps_of(made, self.config)[len(record.done("dense")) :]
            record.adopt("dense", adopted, {**self.watch.so_far(), "dense_pass_s": made.seconds})
        return made

    def allocate(self, dense: DensePass) -> tuple[Allocated, OutputFormat]:
        """Decide what every layer loses, and the format that follows from it."""
        shapes, curves = layer_shapes(self.source, self.config), self._curves(dense)
        found = self.ranks.made_by_first(
            lambda: dataclasses.asdict(allocate(dense.similarity, shapes, self.config, curves))
        )
        allocated = Allocated(**{**found, "removals": [LayerRemoval(**removal) for removal in found["removals"]]})
        for note in allocated.notes:
            _log.info("%s.", note)
        new_bias = self.config.adds_bias
        sizes = [
            size.without(removal.units, removal.channels, self.config.head_unit, new_bias)
            for size, removal in zip(self.sizes, allocated.removals)
        ]
        dtype = torch_dtype(self.config.dtype) if self.config.dtype else _config_dtype(self.source)
        output = output_format(self.source.config, sizes, dtype)
        if output.name.startswith("slim_"):
            if self.source.container or self.config.program in ("transformers", "vllm"):
                raise InputError(
                    f"transformers' {self.source.spec.name} has no place for layers of the sizes that the allocation "
                    f"{self.config.allocation.name} gives; choose another one, or another ratio."
                )
            if self.config.allocation.alike:
                self._say_why_native(sizes)
        return allocated, output

    def _say_why_native(self, sizes: list[LayerSizes]) -> None:
        """Say what keeps layers of equal sizes from being written in an architecture of transformers."""
        spec, heads, width = self.source.spec, sizes[0].num_heads, self.source.config.hidden_size
        if not spec.takes_heads(self.source.config, heads):
            why = f"does not take {heads} heads with a hidden size of {width}"
        elif not spec.stock_holds(biases_of(sizes)):
            why = "has no place for the recovery's biases"
        else:
            return
        _log.warning(
            "The result has the native format, because transformers' %s %s; give --for transformers.", spec.name, why
        )

    def _curves(self, dense: DensePass) -> list[Curves] | None:
        return None if self.config.allocation.needs is None else dense.curves()

    def _say_if_few(self, token_ids: torch.Tensor) -> None:
        """Warn if a fit has more unknowns than there are tokens."""
        if warning := too_few_tokens(self.config, self.sizes, self.source.config, *token_ids.shape):
            _log.warning(warning)

    def report(
        self, pruning: Pruning, allocated: Allocated, output: OutputFormat, model: str, out: str | None, parameters: int
    ) -> PruneReport:
        """Build the report of a run after all layers are pruned."""
        source, config, layers = self.source, self.config, pruning.reports
        layers_before = sum(size.params for size in self.sizes)
        layers_after = sum(layer["parameters_after"] for layer in layers)
        added = allocated.note_of_biases(layers_before, layers_after, output.name) + notes_of_experts(layers)
        for note in added:
            _log.info("%s.", note)
        before, judged_by = self.parameters_before, perplexity_windows(self.calibration)
        return PruneReport(
            model=model,
            out=out,
            config=config.to_dict(),
            allocation={
                "target_params": allocated.target_params,
                "pruned_layers": allocated.pruned_layers,
                "alpha": allocated.alpha,
                "round_to": allocated.round_to,
                "notes": allocated.notes + added,
            },
            calibration={
                "text": calibration_name(config),
                "bos": self.calibration.bos,
                "bos_token_id": self.calibration.bos_token_id,
                "samples": self.token_ids.shape[0],
                "seq_len": self.token_ids.shape[1],
                "tokens": self.token_ids.numel(),
                "held_out": len(self.calibration.held_out),
                "dense_windows": pruning.dense.windows,
                "perplexity_tokens": judged_by.numel(),
                "perplexity_dense": _exp(pruning.dense.loss),
                "perplexity_pruned": _exp(pruning.loss),
            },
            parameters={
                "before": before,
                "after": parameters,
                "layers_before": layers_before,
                "layers_after": layers_after,
            },
            achieved_ratio=1 - layers_after / layers_before,
            achieved_ratio_model=1 - parameters / before,
            elapsed_s=self.watch.elapsed_s(),
            setup_s=self.setup_s,
            dense_pass_s=pruning.dense.seconds,
            stages_s=dict(self.watch.seconds),
            peak_host_gib=max(memory.peak_host_gib(), *(layer["peak_host_gib"] for layer in layers)),
            peak_gpu_gib=memory.peak_gpu_gib(source.device),
            memory_gib={name: size / GIB for name, size in self.plan.host.items()},
            gpu_memory_gib={name: size / GIB for name, size in self.plan.gpu.items()},
            plan=self.plan.describe(),
            backend=self.backend,
            operations=dispatch.ran(),
            device=str(source.device),
            compute_dtype=str(source.dtype).removeprefix("torch."),
            format=source.container.model_type if source.container else output.name,
            versions=versions(),
            threads=torch.get_num_threads(),
            layers=layers,
            tensor_parallel=tensor_parallel_sizes(
                (layer["num_heads"], layer["num_kv_heads"], layer["intermediate_size"]) for layer in layers
            ),
            resumed_steps=self.resumed_steps,
        )


def too_few_tokens(
    config: PruneConfig, sizes: list[LayerSizes], model: PretrainedConfig, samples: int, seq_len: int
) -> str:
    """Return a warning if a fit has more unknowns than there are tokens, and describes only them; else an empty string."""
    unknowns = tokens_to_fit(sizes, model)
    if Needs.COLUMN_GRAM not in config.needs or samples * seq_len >= unknowns:
        return ""
    names = [method.name for method in (config.criterion, config.recovery) if Needs.COLUMN_GRAM in method.needs]
    who = " and ".join(names)
    what = f"the {unknowns:,} channels of an FFN"
    if (experts := max(size.experts for size in sizes)) > 1:
        what = f"{experts} experts, some of which see few tokens and need {unknowns:,} of all,"
    return (
        f"{who} {'fit' if len(names) > 1 else 'fits'} {what} on "
        f"{samples * seq_len:,} calibration tokens, which are fewer, so the result will be good only on this text; give at "
        f"least {-(-unknowns // seq_len)} samples of {seq_len} tokens, better several times as many."
    )


def plan_of(
    source: ModelSource,
    windows: tuple[int, int, int],
    config: PruneConfig,
    runtime: float,
    folder: Path | None,
    begun: dict[str, Any] | None,
    num_ranks: int,
) -> Plan:
    """Plan how to prune a model with windows (samples, seq_len, held out) within the budgets of the settings."""
    stored = source.checkpoint.dtype_in_memory() if isinstance(source, CheckpointModel) else source.dtype
    params = sum(torch.Size(shape).numel() for shape in source.shapes().values())
    dtypes = stored, source.dtype, torch_dtype(config.dtype) if config.dtype else _config_dtype(source)
    sizes = sizes_of(source.config, source.sizes(), source.head_dim, params, dtypes, windows, source.device, num_ranks)
    return make_plan(sizes, config, runtime, GPU_RUNTIME, folder, begun)


def _exp(loss: float) -> float:
    """Convert a loss to a perplexity, which is capped so that the report of a hopeless model stays valid JSON."""
    return math.exp(min(loss, 700.0))


def weight_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype in which a checkpoint is stored, as given by its embeddings."""
    return checkpoint.storage_dtype(f"{family_of(checkpoint.config.model_type).embedding}.weight")


def _config_dtype(source: ModelSource) -> torch.dtype:
    return weight_dtype(source.checkpoint) if isinstance(source, CheckpointModel) else source.dtype
