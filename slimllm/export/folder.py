"""Folders of an architecture of transformers: code shared by `stock` and `padded`."""

from __future__ import annotations

import logging
import math
import shutil
from abc import abstractmethod

import torch

from slimllm.checkpoints.destination import check_destination, check_space
from slimllm.checkpoints.journal import begun_with
from slimllm.checkpoints.output_format import OutputFormat, biases_of, output_format, write_config
from slimllm.checkpoints.source import CheckpointModel
from slimllm.checkpoints.writer import CheckpointWriter, partial_folder
from slimllm.errors import InputError
from slimllm.export.base import Exporter, ExportJob
from slimllm.export.padding import pad_layer
from slimllm.export.source import ExportSource
from slimllm.models.slicing import LayerSizes
from slimllm.pruning.tensor_parallel import tensor_parallel_line, tensor_parallel_sizes
from slimllm.runtime.progress import PartWritten

_log = logging.getLogger("slimllm")


class FolderExporter(Exporter):
    """Writer of a folder of an architecture of transformers itself."""

    checks_destination = True

    @abstractmethod
    def padded_sizes(self, source: CheckpointModel) -> LayerSizes | None:
        """Return the sizes that every layer is padded to, or None for no padding."""

    def write(self, job: ExportJob) -> str:
        source, checkpoint = job.source, job.source.checkpoint
        if checkpoint.container:
            raise InputError(
                f"{checkpoint.path} is a {checkpoint.container.model_type}, whose classes are transformers' own; only "
                "--to gguf, of the language model alone, applies."
            )
        check_destination(job.out, [checkpoint.path], job.overwrite)
        form, wanted = self._form(source)
        sizes = source.sizes()
        check_space(job.out, _bytes(source, sizes, wanted))
        for sentence in checkpoint.left_out():
            _log.info(sentence)
        _log.info("%s.", tensor_parallel_line(tensor_parallel_sizes(map(_alike, [wanted] if wanted else sizes))))
        _write(job, sizes, wanted, form)
        return form.name

    def _form(self, source: ExportSource) -> tuple[OutputFormat, LayerSizes | None]:
        """Return the format, and the sizes that layers are padded to.

        Zero biases that the format has no place for are left out of the source.

        Raises:
            ValueError: (as InputError) no format holds the model without loss; the message says why.
        """
        refused = None
        for _ in source.fewer_and_fewer():
            sizes = source.sizes()
            wanted = self.padded_sizes(source)
            try:
                return stock_format(source, [wanted] * len(sizes) if wanted else sizes), wanted
            except InputError as error:
                refused = refused or error
        assert refused
        raise refused


def stock_format(source: CheckpointModel, sizes: list[LayerSizes]) -> OutputFormat:
    """Return the architecture of transformers that holds layers of these sizes.

    Raises:
        ValueError: (as InputError) there is none, or it does not support a bias or the number of heads.
    """
    first, family = sizes[0], source.spec.name
    if source.spec.slopes:
        raise InputError(
            f"transformers' {family} computes the slopes of its position bias from the number of heads, and would change "
            "those of the kept heads; only the native format, which slimllm prune writes, keeps them."
        )
    dtype = source.checkpoint.storage_dtype(f"{source.spec.embedding}.weight")
    form = output_format(source.config, sizes, dtype)
    if not form.name.startswith("slim_"):
        return form
    biases = biases_of(sizes)
    if not (source.spec.stock_holds(biases) or source.spec.fits_llama(source.config)):
        words = {"qkv": "q, k and v", "out": "o", "gate": "gate and up", "down": "down"}
        some = ", ".join(word for name, word in words.items() if getattr(biases, name))
        raise InputError(
            f"The model has biases of these projections: {some}. transformers' {family} has no place for them, and leaving "
            "them out would change the model; keep the native format, or prune with --for transformers if the "
            "recovery added them."
        )
    if any(_alike(size) != _alike(first) for size in sizes):
        raise InputError(
            "The layers have different sizes, which no architecture of transformers supports; give --to padded, or prune "
            "with --for transformers."
        )
    raise InputError(
        f"transformers' {family} does not take {first.num_heads} heads with a hidden size of "
        f"{source.config.hidden_size}; give --to padded."
    )


def _alike(size: LayerSizes) -> tuple[int, int, int]:
    return size.num_heads, size.num_kv_heads, size.intermediate_size


def _bytes(source: CheckpointModel, sizes: list[LayerSizes], wanted: LayerSizes | None) -> int:
    """Return the bytes that the weights take on disk."""
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


def _write(job: ExportJob, sizes: list[LayerSizes], wanted: LayerSizes | None, form: OutputFormat) -> None:
    source, out = job.source, job.out
    checkpoint = source.checkpoint
    if "export" in begun_with(partial_folder(out)):  # left by an export that was killed at its very end; cannot be resumed
        shutil.rmtree(partial_folder(out))
    with CheckpointWriter(out, source.num_layers + 1, job.overwrite, {"export": form.name}, {}) as writer:
        for index, size in enumerate(sizes):
            tensors = source.weights(index)
            if wanted:
                tensors = pad_layer(tensors, source.spec, size, wanted, source.head_dim)
            prefix = source.layer_prefix(index)
            complete = form.complete(tensors, source.spec)
            writer.write_shard(index + 1, {prefix + name: tensor for name, tensor in complete.items()})
            if job.progress:
                job.progress(PartWritten(index + 1, source.num_layers))
        writer.write_shard(source.num_layers + 1, checkpoint.read(source.other_tensors()))
        write_config(form.config, writer.folder, checkpoint)
        checkpoint.write_companions(writer.folder)
        writer.complete()
        writer.finish()
