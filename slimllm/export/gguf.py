"""Export to a GGUF file for llama.cpp, with one tensor in memory at a time.

Models that compute as LLaMA does are written as architecture `llama` if their layers have equal sizes and no biases, and
otherwise as `deci`, which is LLaMA's mathematics with sizes by layer. Other families are written as their own architecture,
if llama.cpp has it, in equal sizes.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from slimllm.checkpoints.destination import check_space
from slimllm.checkpoints.gguf import rope_order
from slimllm.checkpoints.journal import sync
from slimllm.checkpoints.source import CheckpointModel
from slimllm.errors import InputError, OutputError
from slimllm.export.base import Exporter, ExportJob, register_exporter
from slimllm.export.gguf_vocabulary import add_vocabulary
from slimllm.models.families.base import GGUFNames
from slimllm.models.llama_cpp import gguf_names, rope_of
from slimllm.models.slicing import LayerSizes
from slimllm.runtime.progress import PartWritten, ProgressCallback

_log = logging.getLogger("slimllm")

_FILE_TYPES = {
    torch.float32: gguf.LlamaFileType.ALL_F32,
    torch.float16: gguf.LlamaFileType.MOSTLY_F16,
    torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
}
_TYPES = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}


@register_exporter("gguf")
class Gguf(Exporter):
    """Writer of a file for llama.cpp, with sizes by layer, tokenizer and chat template, in the dtype of the model."""

    checks_destination = True

    def write(self, job: ExportJob) -> str:
        return _write_file(job)


def _write_file(job: ExportJob) -> str:
    """Write the file, and return the architecture."""
    source, out, overwrite, progress = job.source, job.out, job.overwrite, job.progress
    source.leave_out(set().union(*source.zero_biases()))
    sizes = source.sizes()
    names = _check(source, sizes, out, overwrite)
    architecture = names.architecture
    if architecture == "llama" and not _are_plain(sizes):
        architecture = "deci"
    if sentence := _about_row_lengths(source):
        _log.warning(sentence)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        check_space(out, sum(math.prod(shape) * _dtype(source, name).itemsize for name, shape in source.shapes().items()))
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            path = Path(folder) / out.name
            _write(source, sizes, path, names, architecture, progress)
            sync(path)
            os.replace(path, out)
            sync(out.parent)
    except OSError as error:
        raise OutputError(f"The disk failed while {out} was being written: {error}.") from error
    return architecture


def _about_row_lengths(source: CheckpointModel) -> str | None:
    """Warn about matrices that llama.cpp cannot quantise to the type asked for: k-quants have blocks of 256 in a row."""
    rows = {name: shape[-1] for name, shape in source.shapes().items() if len(shape) > 1}
    odd = {name: length for name, length in rows.items() if length % 256}
    if not odd:
        return None
    sentence = (
        f"{len(odd)} of {len(rows)} matrices have rows whose length is not a multiple of 256, so llama-quantize falls back "
        "from k-quants (Q4_K_M, …) to larger types for them"
    )
    if unquantised := sum(length % 32 > 0 for length in odd.values()):
        sentence += f", and leaves {unquantised}, whose rows are not a multiple of 32 either, in 16 bits"
    helped = sum(f".{source.spec.down_proj}." in name and length > 256 for name, length in odd.items())
    if helped:
        sentence += f"; --round-to 256 when pruning keeps the FFN widths multiples of 256, which helps {helped} of them"
    return f"{sentence}."


def _dtype(source: CheckpointModel, name: str) -> torch.dtype:
    """Return the dtype a tensor is written in: that of the checkpoint for matrices, fp32 for others, as llama.cpp does."""
    stored = source.checkpoint.storage_dtype(name)
    return stored if len(source.shapes()[name]) > 1 and stored in _TYPES else torch.float32


def _are_plain(sizes: list[LayerSizes]) -> bool:
    """Return whether all layers have the same size and no biases."""
    biases = any(size.qkv_bias or size.attention_out_bias or size.gate_bias or size.ffn_out_bias for size in sizes)
    return not biases and all(size == sizes[0] for size in sizes)


def _check(source: CheckpointModel, sizes: list[LayerSizes], out: Path, overwrite: bool) -> GGUFNames:
    """Return how llama.cpp reads the model."""
    if out.suffix != ".gguf":
        raise InputError(f"The name of a GGUF file must end with .gguf, got {out}.")
    if out.is_dir():
        raise InputError(f"{out} is a folder; give the name of a file.")
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists already; give another name, or --overwrite to replace the file.")
    if out.exists():
        with out.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{out} is not a GGUF file, so it will not be overwritten; give another name.")
    names = gguf_names(source.spec, source.config)
    if source.spec.fits_llama(source.config):
        _check_biases(source, sizes)
    elif not _are_plain(sizes):
        raise InputError(
            f"llama.cpp reads {source.spec.name} with the same size in all layers and without biases; prune with --for "
            "llama.cpp."
        )
    return names


def _check_biases(source: CheckpointModel, sizes: list[LayerSizes]) -> None:
    wide = [index for index, size in enumerate(sizes) if size.num_heads * source.head_dim != source.config.hidden_size]
    if sizes[0].qkv_bias and wide:
        raise InputError(
            "llama.cpp has no place for the biases of q, k and v in layers with fewer heads; the native format keeps them."
        )


def _write(
    source: CheckpointModel,
    sizes: list[LayerSizes],
    path: Path,
    read_as: GGUFNames,
    architecture: str,
    progress: ProgressCallback | None,
) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    _add_settings(writer, source, sizes, architecture)
    for name, value in read_as.settings(source.config).items():
        add: Any = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{architecture}.{name}", value)
    with tempfile.TemporaryDirectory() as companions:
        source.checkpoint.write_companions(Path(companions))
        add_vocabulary(writer, Path(companions), source.config.vocab_size)
    factors = _rope_factors(writer, source)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, np.dtype(np.float32), factors.nbytes)
    names = dict(_names(source, read_as))
    for name, theirs in names.items():
        shape = source.shapes()[name]
        kind = _TYPES[_dtype(source, name)]
        if kind == gguf.GGMLQuantizationType.BF16:
            num_bytes = 2 * math.prod(shape)
            writer.add_tensor_info(theirs, (*shape[:-1], 2 * shape[-1]), np.dtype(np.uint8), num_bytes, raw_dtype=kind)
        else:
            numbers = np.dtype(np.float32 if kind == gguf.GGMLQuantizationType.F32 else np.float16)
            writer.add_tensor_info(theirs, shape, numbers, numbers.itemsize * math.prod(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for number, name in enumerate(names):
        tensor = source.checkpoint.read([name])[name]
        if read_as.adjacent_pairs:
            tensor = _in_their_order(source, sizes, name, tensor)
        if read_as.one_added and names[name].endswith("norm.weight"):
            tensor = tensor.float() + 1
        tensor = tensor.to(_dtype(source, name)).contiguous()
        content: Any = tensor.view(torch.uint8) if tensor.dtype == torch.bfloat16 else tensor
        writer.write_tensor_data(content.numpy())
        if progress:
            progress(PartWritten(number + 1, len(names)))
    writer.close()


def _names(source: CheckpointModel, read_as: GGUFNames) -> Iterator[tuple[str, str]]:
    """Yield the name of every tensor in the checkpoint and in GGUF."""
    layer_names = {ours: theirs for theirs, ours in read_as.layer.items()}
    model_names = {ours: theirs for theirs, ours in read_as.model.items()}
    for name in source.shapes():
        module, kind = name.rsplit(".", 1)
        if module in model_names:
            yield name, f"{model_names[module]}.{kind}"
        else:
            index, own = module.removeprefix(f"{source.spec.layers}.").split(".", 1)
            yield name, f"blk.{index}.{layer_names[own]}.{kind}"


def _in_their_order(source: CheckpointModel, sizes: list[LayerSizes], name: str, tensor: torch.Tensor) -> torch.Tensor:
    for projection, heads in ((source.spec.q_proj, "num_heads"), (source.spec.k_proj, "num_kv_heads")):
        if f".{projection}." in name:
            index = int(name.removeprefix(f"{source.spec.layers}.").split(".", 1)[0])
            return rope_order(tensor, getattr(sizes[index], heads))
    return tensor


def _add_settings(writer: gguf.GGUFWriter, source: CheckpointModel, sizes: list[LayerSizes], architecture: str) -> None:
    config = source.config
    by_layer = {
        writer.add_head_count: [size.num_heads for size in sizes],
        writer.add_head_count_kv: [size.num_kv_heads for size in sizes],
        writer.add_feed_forward_length: [size.intermediate_size for size in sizes],
    }
    for add, numbers in by_layer.items():
        add(numbers if architecture == "deci" else numbers[0])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(source.checkpoint.name)
    writer.add_file_type(_FILE_TYPES[_dtype(source, f"{source.spec.embedding}.weight")])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(sizes))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(source.head_dim)
    writer.add_value_length(source.head_dim)
    writer.add_rope_dimension_count(source.head_dim)
    writer.add_vocab_size(config.vocab_size)


def _rope_factors(writer: gguf.GGUFWriter, source: CheckpointModel) -> np.ndarray[Any, Any] | None:
    """Write the settings of the rotary embedding; return divisors of its frequencies if GGUF has no such setting."""
    kind, theta, rope = rope_of(source.config)
    writer.add_rope_freq_base(theta)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "llama3":
        rotary: Any = source.model.get_submodule(source.spec.rotary)
        plain = theta ** -(torch.arange(0, source.head_dim, 2, dtype=torch.float64) / source.head_dim)
        factors: np.ndarray[Any, Any] = (plain / rotary.inv_freq.double()).float().numpy()
        return factors
    return None
