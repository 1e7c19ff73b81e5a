"""`export`: a model in another form, which more programs load. Called by the command line and users."""

from __future__ import annotations

from pathlib import Path

from slimllm.checkpoints.destination import destination
from slimllm.checkpoints.opening import open_checkpoint
from slimllm.errors import InputError
from slimllm.export.base import Exporter, ExportJob
from slimllm.export.source import ExportSource
from slimllm.plugins import EXPORTERS, calling
from slimllm.runtime.progress import ProgressCallback


def export(
    model: str | Path,
    out: str | Path,
    to: str | Exporter,
    *,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> str:
    """Write a model in another form, a layer in memory at a time.

    `stock`: an architecture of transformers itself, for models whose layers are alike (`slimllm prune --uniform`).
    `padded`: the same for any, every layer brought to the sizes of the largest by zeros, which is exact and gives the
    speed and the memory of pruning back. `gguf`: a file for llama.cpp, with sizes by layer, tokenizer and chat template,
    in the dtype of the model.

    Tensors that change nothing are left out where the form has no place for them: a copy of the embeddings as the head of a
    tied model, biases that are 0 in every layer.

    What is worth knowing is logged: for `stock` and `padded` over how many devices tensor parallelism can split the model,
    for `gguf` which matrices llama.cpp cannot quantise as it is told to.

    Args:
        model: A Hugging Face folder, pruned or not, or a hub id.
        out: The folder, or for `gguf` the file, to make. It appears when it is complete.
        to: `stock`, `padded`, `gguf`, or another `slimllm.export.Exporter` or its name.
        overwrite: Replace what is in its place already, if that is a model.
        progress: Called with a `PartWritten` after every part that is written.

    Returns:
        The architecture that was written.

    Raises:
        ValueError: (as InputError) the model cannot be written so without a loss; says which form keeps all. Or the
            model or the place to write to is not fit.
    """
    exporter: Exporter = EXPORTERS.make(to)
    out = destination(out)
    checkpoint = open_checkpoint(model)
    if checkpoint.path.is_file():
        raise InputError(f"{model} is a GGUF file already; give the folder that slimllm prune wrote.")
    if not exporter.checks_destination and out.exists() and not overwrite:
        raise InputError(f"{out} exists; give another place, or --overwrite.")
    with calling(exporter, "writing the model"):
        return exporter.write(ExportJob(ExportSource(checkpoint), out, overwrite, progress))
