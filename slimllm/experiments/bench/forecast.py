"""Forecast for `slimllm plan`: the plan of a run, made from the configuration alone, and an estimate of its time."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from slimllm.calibration import num_held_out, sources_of
from slimllm.checkpoints.contained import container_of
from slimllm.checkpoints.folder import read_config
from slimllm.checkpoints.fused import read_as
from slimllm.checkpoints.opening import download, open_checkpoint
from slimllm.checks import GIB, parse_device, torch_dtype
from slimllm.config import PruneConfig, check_config
from slimllm.errors import InputError
from slimllm.experiments.bench.shapes import SHAPES
from slimllm.experiments.bench.work import measure_rates, stage_work
from slimllm.models.families import Container, family_of, head_dim_of
from slimllm.models.meta import expected_tensors, meta_model
from slimllm.models.slicing import LayerSizes, sizes_by_layer
from slimllm.pruning.memory_estimate import Parts, batch_windows, sizes_of, traffic
from slimllm.pruning.plan import GPU_RUNTIME, Plan, make_plan
from slimllm.pruning.programs import fit_program
from slimllm.pruning.run import too_few_tokens, weight_dtype
from slimllm.pruning.shapes import check_experts, dense_windows, samples_for, streams_heads, tokens_to_fit
from slimllm.runtime.memory import resident_gib

# A run's time divided by that of the counted operations, which leave out norms, activations and copies
# (benchmarks/NOTES.md).
_TIMES_FLOOR = 2.0
_LOADED_LATER = GIB / 10  # memory that a run takes before it makes its own plan: libraries' buffers, the tokenizer


@dataclass(frozen=True)
class Forecast:
    """Plan of a run, its estimated seconds on this machine, and its inputs.

    With several ranks, plan and seconds are those of each rank, and `traffic` is the number of bytes that ranks exchange.
    `warning` is a sentence if a fit has more unknowns than there are calibration tokens, else empty. `notes` are sentences
    about settings that follow from the program that the result is for.
    """

    model: str
    num_layers: int
    params: int
    compute_dtype: str
    device: str
    plan: Plan
    seconds: float | None
    mixture: bool
    ranks: int
    traffic: Parts
    warning: str
    notes: list[str]


def forecast(model: str, config: PruneConfig, ranks: int = 1, for_gpu: bool = False) -> Forecast:
    """Plan a run from the model's configuration alone.

    Args:
        model: A folder with a config.json, a GGUF file, a hub id (its config.json is fetched), or the name of a shape.
        config: The settings; the number of tokens is `samples` times `seq_len`, as if the text were long enough.
        ranks: Processes that share the windows, each on a machine or a GPU like this one.
        for_gpu: Plan for a GPU, even if this machine has none; the time is then unknown.

    Raises:
        ValueError: (as InputError) there is no such model, the run does not fit the budgets, the model's number of heads
            is not a multiple of `heads_multiple_of`, or the program that the result is for cannot read it.
    """
    check_config(config)
    sources_of(config.calibration)  # raises the errors that the run would raise
    device = torch.device("cuda") if for_gpu else parse_device(config.device)
    there = device.type == "cpu" or torch.cuda.is_available()
    model_config, stored, in_memory, container = _description(model)
    default = torch.float32 if device.type == "cpu" else stored
    computed = torch_dtype(config.compute_dtype) if config.compute_dtype else default
    spec, head_dim = family_of(model_config.model_type), head_dim_of(model_config)
    shapes = expected_tensors(meta_model(model_config), spec)
    layers = sizes_by_layer(shapes, spec, head_dim, model_config.num_hidden_layers)
    for layer in layers:
        layer.unit_step(config.head_unit, config.heads_multiple_of)  # raises the errors that the run would raise
    check_experts(spec, config)
    config, notes = fit_program(config, model_config, layers, container)
    tokens = tokens_to_fit(layers, model_config)
    config = dataclasses.replace(config, samples=(samples := samples_for(config, tokens)))
    if not 1 <= ranks <= samples:
        raise InputError(f"ranks must be from 1 to the number of samples ({samples}), got {ranks}.")
    params = sum(torch.Size(shape).numel() for shape in shapes.values())
    dtypes = in_memory, computed, torch_dtype(config.dtype) if config.dtype else stored
    windows = (samples, config.seq_len, num_held_out(samples))
    sizes = sizes_of(model_config, layers, head_dim, params, dtypes, windows, device, ranks)
    plan = make_plan(sizes, config, resident_gib() * GIB + _LOADED_LATER, GPU_RUNTIME)
    windows_of_all = dense_windows(config, tokens, samples, config.seq_len)
    own = dataclasses.replace(config, samples=math.ceil(samples / ranks))
    rates = measure_rates(device, computed) if there and layers[0].experts == 1 else None
    work = stage_work(
        _report(layers, own, device, (model_config.hidden_size, head_dim), math.ceil(windows_of_all / ranks)),
        layers,
        model_config.hidden_size,
        head_dim,
        stored.itemsize,
        ranks,
    )
    return Forecast(
        model=model,
        num_layers=len(layers),
        params=params,
        compute_dtype=str(computed).removeprefix("torch."),
        device=str(device),
        plan=plan,
        mixture=layers[0].experts > 1,
        seconds=_TIMES_FLOOR * sum(rates.floor_s(part) for part in work.values()) if rates else None,
        ranks=ranks,
        traffic=traffic(sizes, config) if ranks > 1 else {},
        warning=too_few_tokens(config, layers, model_config, samples, config.seq_len),
        notes=notes,
    )


def _description(model: str) -> tuple[PretrainedConfig, torch.dtype, torch.dtype, Container | None]:
    """Return the configuration, the weights' dtypes in the files and in memory, and the larger model that contains it."""
    if model in SHAPES:
        return SHAPES[model].config(), torch.bfloat16, torch.bfloat16, None
    path = Path(model).expanduser()
    if path.is_file():
        checkpoint = open_checkpoint(path)
        return checkpoint.config, weight_dtype(checkpoint), checkpoint.dtype_in_memory(), None
    config = read_config(path if path.is_dir() else download(model, only=("config.json",)))
    container = container_of(config)
    dtype = getattr(config, "dtype", None) or torch.float32
    config = container.language_model(config.text_config) if container else read_as(config)
    stored = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(stored, torch.dtype) or not stored.is_floating_point:
        stored = torch.float32
    return config, stored, stored, container


def _report(
    layers: list[LayerSizes], config: PruneConfig, device: torch.device, shape: tuple[int, int], windows: int
) -> dict[str, object]:
    """Return the part of a report that the count of operations needs, with the ratio spread evenly.

    Args:
        shape: hidden_size and head_dim.
        windows: Number of windows of the dense pass.
    """
    kept, samples = 1 - config.ratio, config.samples
    assert samples is not None
    return {
        "calibration": {
            "samples": samples,
            "dense_windows": windows,
            "tokens": samples * config.seq_len,
            "seq_len": config.seq_len,
            "held_out": num_held_out(samples),
        },
        "config": config.to_dict(),
        "device": str(device),
        "layers": [
            {
                "num_heads": max(1, round(kept * size.num_kv_heads)) * size.group_size,
                "intermediate_size": max(1, round(kept * size.intermediate_size)),
                "attention_statistics": _statistics(size, config, samples, device, shape),
                "parameters_before": size.params,
                "parameters_after": round(kept * size.params),
            }
            for size in layers
        ],
    }


def _statistics(size: LayerSizes, config: PruneConfig, samples: int, device: torch.device, shape: tuple[int, int]) -> str:
    if device.type == "cuda" and not torch.cuda.is_available():
        return "gram"
    batches = math.ceil(samples / batch_windows(samples, config.seq_len, config.batch_size))
    tokens, weight = (samples * config.seq_len, batches), torch.Size([shape[0], size.num_heads * shape[1]])
    return "heads" if streams_heads(config, tokens, weight, size.units(config.head_unit)[0], device) else "gram"
