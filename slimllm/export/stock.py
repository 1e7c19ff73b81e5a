"""`slimllm export`: a pruned model in another form, which more programs load. Called by the command line and users."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from slimllm.checkpoints.destination import check_destination, check_space, destination
from slimllm.checkpoints.journal import begun_with
from slimllm.checkpoints.native import OutputFormat, heads_fit, is_llama, output_format, write_config
from slimllm.checkpoints.opening import open_checkpoint
from slimllm.checkpoints.source import CheckpointModel
from slimllm.checkpoints.writer import CheckpointWriter, partial_folder
from slimllm.config import check_choice
from slimllm.errors import InputError
from slimllm.export.gguf import write_gguf
from slimllm.export.padding import pad_layer, padded_sizes
from slimllm.export.source import ExportSource
from slimllm.models.slicing import LayerSizes
from slimllm.pruning.tensor_parallel import tensor_parallel_line, tensor_parallel_sizes
from slimllm.runtime.progress import ProgressCallback

TARGETS = ("stock", "padded", "gguf")


def export(
    model: str | Path,
    out: str | Path,
    to: str,
    *,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
    notice: Callable[[str], None] | None = None,
) -> str:
    """Write a model in another form, a layer in memory at a time.

    `stock`: an architecture of transformers itself, for models whose layers are alike (`slimllm prune --uniform`).
    `padded`: the same for any, every layer brought to the sizes of the largest by zeros, which is exact and gives the
    speed and the memory of pruning back. `gguf`: a file for llama.cpp, with sizes by layer, tokenizer and chat template,
    in the dtype of the model.

    Tensors that change nothing are left out where the form has no place for them: a copy of the embeddings as the head of a
    tied model, biases that are 0 in every layer.

    Args:
        model: A Hugging Face folder, pruned or not, or a hub id.
        out: The folder, or for `gguf` the file, to make. It appears when it is complete.
        to: `stock`, `padded` or `gguf`.
        overwrite: Replace what is in its place already, if that is a model.
        progress: Told about everything that is written.
        notice: Called with a sentence: for `stock` and `padded` over how many devices tensor parallelism can split the
            model, for `gguf` which matrices llama.cpp cannot quantise as it is told to.

    Returns:
        The architecture that was written.

    Raises:
        ValueError: (as InputError) the model cannot be written so without a loss; says which form keeps all. Or the
            model or the place to write to is not fit.
    """
    check_choice("to", to, TARGETS)
    out = destination(out)
    checkpoint = open_checkpoint(model)
    if checkpoint.path.is_file():
        raise InputError(f"{model} is a GGUF file already; give the folder that slimllm prune wrote.")
    source = ExportSource(checkpoint)
    if to == "gguf":
        return write_gguf(source, out, overwrite, progress, notice)
    check_destination(out, [checkpoint.path], overwrite)
    form, wanted = _form(source, to)
    sizes = source.sizes()
    check_space(out, _bytes(source, sizes, wanted))
    if notice:
        for sentence in checkpoint.left_out():
            notice(sentence)
        notice(f"{tensor_parallel_line(tensor_parallel_sizes(map(_alike, [wanted] if wanted else sizes)))}.")
    _write(source, sizes, wanted, form, out, overwrite, progress)
    return form.name


def _form(source: ExportSource, to: str) -> tuple[OutputFormat, LayerSizes | None]:
    """The format to write, and the sizes that layers are padded to; of the source it leaves out what has no place in it.

    Raises:
        ValueError: (as InputError) no format holds the model without a loss; says why it does not hold the whole.
    """
    refused = None
    for _ in source.fewer_and_fewer():
        sizes = source.sizes()
        wanted = _padded(source, sizes) if to == "padded" else None
        try:
            return stock_format(source, [wanted] * len(sizes) if wanted else sizes), wanted
        except InputError as error:
            refused = refused or error
    assert refused
    raise refused


def _padded(source: CheckpointModel, sizes: list[LayerSizes]) -> LayerSizes:
    """Sizes that hold every layer, with as many heads as the architecture asks for."""
    wanted = padded_sizes(sizes)
    if is_llama(source.config, source.spec):  # seed_oss takes any number
        return wanted
    for more in range(source.config.hidden_size):
        kv_heads = wanted.num_kv_heads + more
        if heads_fit(source.config, source.spec, kv_heads * wanted.group_size):
            return dataclasses.replace(wanted, num_kv_heads=kv_heads, num_heads=kv_heads * wanted.group_size)
    return wanted


def stock_format(source: CheckpointModel, sizes: list[LayerSizes]) -> OutputFormat:
    """The architecture of transformers that holds layers of these sizes.

    Raises:
        ValueError: (as InputError) there is none, or it has no place for a bias, or for so many heads.
    """
    first, family = sizes[0], source.spec.family
    if source.spec.slopes:
        raise InputError(
            f"transformers' {family} computes the slopes of its position bias from the number of heads, and would give "
            "heads that are left other ones; only the native format, which slimllm prune writes, keeps them."
        )
    dtype = source.checkpoint.storage_dtype(f"{source.spec.embedding}.weight")
    form = output_format(source.config, sizes, dtype)
    if not form.name.startswith("slim_"):
        return form
    if any(_alike(size) != _alike(first) for size in sizes):
        raise InputError(
            "The layers have sizes of their own, which no architecture of transformers holds; give --to padded, or prune "
            "with --uniform."
        )
    if not heads_fit(source.config, source.spec, first.num_heads):
        raise InputError(
            f"transformers' {family} does not take {first.num_heads} heads beside a hidden size of "
            f"{source.config.hidden_size}; give --to padded."
        )
    raise InputError(
        f"The model has biases of its output projections, for which transformers' {family} has no place, and leaving them "
        "out would change the model; the native format that it is in keeps them, and --recovery none makes none."
    )


def _alike(size: LayerSizes) -> tuple[int, int, int]:
    return size.num_heads, size.num_kv_heads, size.intermediate_size


def _bytes(source: CheckpointModel, sizes: list[LayerSizes], wanted: LayerSizes | None) -> int:
    """What the weights take when they are written."""
    total = 0
    for name, shape in source.shapes().items():
        if not name.startswith(f"{source.spec.layers}."):
            total += math.prod(shape) * source.checkpoint.storage_dtype(name).itemsize
    for index, size in enumerate(sizes):
        prefix = source.layer_prefix(index)
        own = {name.removeprefix(prefix): shape for name, shape in source.shapes().items() if name.startswith(prefix)}
        tensors = {name: torch.empty(shape, device="meta") for name, shape in own.items()}
        if wanted:
            tensors = pad_layer(tensors, source.spec, size, wanted, source.head_dim)
        total += sum(
            tensor.numel() * source.checkpoint.storage_dtype(prefix + name).itemsize for name, tensor in tensors.items()
        )
    return total


def _write(
    source: CheckpointModel,
    sizes: list[LayerSizes],
    wanted: LayerSizes | None,
    form: OutputFormat,
    out: Path,
    overwrite: bool,
    progress: ProgressCallback | None,
) -> None:
    checkpoint = source.checkpoint
    if "export" in begun_with(partial_folder(out)):  # one that was killed at its very end; there is nothing to go on with
        shutil.rmtree(partial_folder(out))
    with CheckpointWriter(out, source.num_layers + 1, overwrite, {"export": form.name}, {}) as writer:
        for index, size in enumerate(sizes):
            tensors = source.weights(index)
            if wanted:
                tensors = pad_layer(tensors, source.spec, size, wanted, source.head_dim)
            prefix = source.layer_prefix(index)
            complete = form.complete(tensors, source.spec)
            writer.write_shard(index + 1, {prefix + name: tensor for name, tensor in complete.items()})
            if progress:
                progress("export", index, source.num_layers, None)
        writer.write_shard(source.num_layers + 1, checkpoint.read(source.other_tensors()))
        write_config(form.config, writer.folder)
        checkpoint.write_companions(writer.folder)
        writer.complete()
        writer.finish()
