"""`export`: writing a model in a format that more programs can load. Called by the command line and users."""

from __future__ import annotations

import tempfile
from pathlib import Path

from slimllm.checkpoints.base import Checkpoint
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
    """Write a model in another format, with one layer in memory at a time.

    `stock`: a folder of an architecture of transformers itself, for models whose layers have equal sizes (pruned with
    `--uniform`). `padded`: the same for any model; zeros pad every layer to the sizes of the largest. This is exact, but
    loses the speed and the memory gained by pruning. `gguf`: a file for llama.cpp, with sizes by layer, tokenizer and chat
    template, in the dtype of the model.

    Tensors that have no effect are left out if the format has no place for them: a copy of the embeddings as the head of a
    tied model, and biases that are 0 in every layer.

    For `stock` and `padded`, a log message says over how many devices tensor parallelism can split the model. For `gguf`,
    a warning says which matrices llama.cpp cannot quantise to the type asked for.

    Args:
        model: A Hugging Face folder, pruned or not, or a hub id.
        out: The folder, or for `gguf` the file, to write. It appears only when it is complete.
        to: `stock`, `padded`, `gguf`, or another `slimllm.export.Exporter` or its name.
        overwrite: Replace an existing model at `out`.
        progress: Called with a `PartWritten` after every part that is written.

    Returns:
        The architecture that was written.

    Raises:
        ValueError: (as InputError) the format cannot hold the model without loss (the message says which one can), the
            model cannot be read, or `out` cannot be written.
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


def check_vocabulary(checkpoint: Checkpoint) -> None:
    """Raise InputError if a model's tokenizer cannot be written to a GGUF file."""
    import gguf

    from slimllm.export.gguf_vocabulary import add_vocabulary

    with tempfile.TemporaryDirectory() as folder:
        checkpoint.write_companions(Path(folder))
        add_vocabulary(gguf.GGUFWriter(None, "llama"), Path(folder), checkpoint.config.vocab_size)
