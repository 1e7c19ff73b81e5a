"""Loading any model, pruned or not, and its perplexity. Called by `slimllm eval`, the demo and users."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from slimllm.calibration import bundled_text, check_seq_len, read_texts, tokenize, windows_of
from slimllm.checkpoint import Checkpoint, download, first_line, open_checkpoint
from slimllm.config import DTYPES, check_choice, parse_device
from slimllm.errors import InputError
from slimllm.families import layer_spec
from slimllm.memory import release
from slimllm.skeleton import expected_tensors, meta_model


def load(
    model: str | Path, *, dtype: str | None = None, device: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer: a Hugging Face folder, pruned or not, a GGUF file or a hub id.

    The native pruned format is known to this package and needs no remote code.

    Args:
        model: The model; of any family that transformers knows.
        dtype: `float32`, `float16` or `bfloat16`; None: float32 on a CPU, the checkpoint's own on a GPU.
        device: `cpu`, `cuda`, …; None: a GPU if there is one.
        trust_remote_code: Run code that comes with the model.

    Raises:
        ValueError: (as InputError) there is no such model, or it cannot be loaded.
    """
    where = parse_device(device)
    if dtype is not None:
        check_choice("dtype", dtype, tuple(DTYPES))
    wanted = DTYPES[dtype] if dtype else (torch.float32 if where.type == "cpu" else None)
    path = locate(model, code=trust_remote_code)
    if path.is_file():
        checkpoint = open_checkpoint(path)
        return _fill(checkpoint, wanted).to(where), checkpoint.tokenizer()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            path, dtype=wanted or "auto", trust_remote_code=trust_remote_code, use_safetensors=True
        )
    except Exception as error:  # transformers and its back ends raise many types for one fact: it cannot be loaded
        raise InputError(f"{model} cannot be loaded: {first_line(error)}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise InputError(
            f"The tokenizer of {model} cannot be loaded; save it in the same folder with tokenizer.save_pretrained. "
            f"It said: {first_line(error)}"
        ) from error
    return loaded.to(where).eval(), tokenizer


def locate(model: str | Path, *, code: bool = False, only: tuple[str, ...] = ()) -> Path:
    """The file, or the folder with a config.json, of a model; one of the hub is fetched as `download` has it.

    Raises:
        ValueError: (as InputError) there is none.
    """
    path = Path(model).expanduser()
    if not path.exists():
        path = download(str(model), code=code, only=only)
    if not path.is_file() and not (path / "config.json").is_file():
        raise InputError(f"{path} holds no config.json; give the folder of a Hugging Face model.")
    return path


def _fill(checkpoint: Checkpoint, dtype: torch.dtype | None) -> PreTrainedModel:
    """A model with the checkpoint's tensors, for files that are not in a format of transformers."""
    model = meta_model(checkpoint.config)
    spec = layer_spec(checkpoint.config.model_type)
    names = expected_tensors(model, spec)
    checkpoint.check(names, spec.layers)
    for name in names:
        tensor = checkpoint.read([name])[name].to(dtype or checkpoint.storage_dtype(name))
        model.load_state_dict({name: tensor}, strict=False, assign=True)
    model.tie_weights()
    return model.requires_grad_(False)


def evaluation_tokens(tokenizer: PreTrainedTokenizerBase, text: str | None, wanted: int) -> torch.Tensor:
    """A text to measure on as token ids, (num_tokens,) int64: a file or a dataset, or None for the bundled one.

    `wanted` bounds how much of a dataset or a long file is read: so many tokens at least, if there are so many.
    """
    documents = [bundled_text("evaluation")] if text is None else read_texts(text, wanted, tokenizer=tokenizer)
    return tokenize(tokenizer, documents)


def perplexity_of(
    model: str | Path, token_ids: torch.Tensor, *, seq_len: int, max_windows: int | None, device: str | None
) -> float:
    """`perplexity` of a model that is loaded for it, and let go again, its memory with it."""
    loaded, _ = load(model, device=device)
    value = perplexity(loaded, token_ids, seq_len=seq_len, max_windows=max_windows)
    del loaded
    release()
    return value


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    token_ids: torch.Tensor,
    *,
    seq_len: int = 128,
    batch_size: int = 8,
    max_windows: int | None = None,
) -> float:
    """exp of the mean next-token negative log-likelihood over non-overlapping windows.

    Each window is scored on its own, its first token only as context, so that seq_len - 1 tokens of each count: the
    protocol of the SlimLLM paper with seq_len 128, and the common one with 2048.

    Args:
        model: A causal language model.
        token_ids: The text, (num_tokens,) int64; what does not fill a window at the end is left out.
        seq_len: Tokens in a window, from 2 to the longest the model takes.
        batch_size: Windows in a forward pass; it changes the result by rounding only.
        max_windows: Take only so many windows from the beginning.

    Raises:
        ValueError: (as InputError) the text is shorter than a window, or a setting is out of range.
    """
    for name, value, least in (("seq_len", seq_len, 2), ("batch_size", batch_size, 1), ("max_windows", max_windows, 1)):
        if value is not None and value < least:
            raise InputError(f"{name} must be at least {least}, got {value}.")
    check_seq_len(seq_len, model.config)
    windows = windows_of(token_ids, seq_len)[:max_windows]
    if len(windows) == 0:
        raise InputError(f"The text has {len(token_ids)} tokens, fewer than one window of {seq_len}; give more text.")
    total = 0.0
    for batch in windows.split(batch_size):
        batch = batch.to(model.device)
        logits = model(batch, use_cache=False).logits
        for scores, ids in zip(logits, batch):
            loss = torch.nn.functional.cross_entropy(scores[:-1].float(), ids[1:], reduction="sum")
            total += float(loss.double())
    return math.exp(min(total / (len(windows) * (seq_len - 1)), 700.0))
