"""Loading of any model, pruned or not, and its perplexity. Called by `slimllm eval`, the demo and users."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from slimllm.calibration import bundled_text, check_seq_len, read_texts, tokenize, windows_of
from slimllm.checkpoints.base import Checkpoint
from slimllm.checkpoints.folder import check_padding, name_some, quantisation_of, read_settings, weight_files
from slimllm.checkpoints.headers import Headers, stored_head_differs
from slimllm.checkpoints.opening import download, open_checkpoint
from slimllm.checkpoints.tokenizer import load_tokenizer
from slimllm.checks import DTYPES, check_choice, parse_device, torch_dtype
from slimllm.errors import InputError, exhausted, first_line
from slimllm.models.families import CONTAINERS, family_of
from slimllm.models.meta import embedding_scale, expected_tensors, meta_model
from slimllm.runtime.cores import share_cores
from slimllm.runtime.memory import free_bytes, release
from slimllm.runtime.progress import ProgressCallback, WindowsScored

_DATASET_WINDOWS = 2048
_LOGITS_BYTES = 2**30  # limit for the logits of one forward pass
_SCORED_ROWS = 256  # rows of logits converted to float32 at a time, since a whole copy would take as much memory again


def load(
    model: str | Path, *, dtype: str | None = None, device: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer: a Hugging Face folder, pruned or not, a GGUF file or a hub id.

    This package knows the native pruned format, which needs no remote code.

    Args:
        model: A model of any family that transformers supports.
        dtype: `float32`, `float16` or `bfloat16`; None: float32 on a CPU, the checkpoint's own on a GPU.
        device: `cpu`, `cuda`, …; None: a GPU if there is one.
        trust_remote_code: Run Python code that comes with the model. Otherwise no code in the folder is executed.

    Raises:
        ValueError: (as InputError) there is no such model, it cannot be loaded, or tensors are missing, left over or of
            another shape.
    """
    where = parse_device(device)
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
    wanted = torch_dtype(dtype) if dtype else (torch.float32 if where.type == "cpu" else None)
    path = locate(model, code=trust_remote_code)
    if path.is_file():
        checkpoint = open_checkpoint(path)
        return _fill(checkpoint, wanted).to(where), checkpoint.tokenizer()
    return _from_folder(path, str(model), wanted, trust_remote_code).to(where).eval(), load_tokenizer(
        path, trust_remote_code
    )


def _from_folder(path: Path, name: str, dtype: torch.dtype | None, trust_remote_code: bool) -> PreTrainedModel:
    """Load the model of a folder with transformers, and check that every tensor was present and used."""
    settings = read_settings(path, trust_remote_code)
    quantised = quantisation_of(settings) is not None
    headers = Headers(weight_files(path))
    if not quantised:
        headers.check(path)
    headers.check_layers(settings, path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        check_padding(config, path)
        if stored_head_differs(config, headers):  # transformers 5 then unties the head; 4 would ignore the stored one
            config.tie_word_embeddings = False
        kind = AutoModelForImageTextToText if config.model_type in CONTAINERS else AutoModelForCausalLM
        loaded, found = kind.from_pretrained(
            path,
            config=config,
            dtype=dtype or "auto",
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # mismatches are reported below
        )
    except InputError:
        raise
    except Exception as error:  # transformers and its back ends raise many types when a model cannot be loaded
        if exhausted(error):
            raise
        needs_code = bool(settings.get("auto_map")) and not trust_remote_code
        hint = " It may need its own Python code, which --trust-remote-code runs." if needs_code else ""
        raise InputError(f"{name} cannot be loaded: {first_line(error)}{hint}") from error
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"{name_some(missing, 'is', 'are')} missing in {path}; is the checkpoint complete?")
    if reshaped := sorted(str(entry[0]) for entry in found["mismatched_keys"]):
        shapes = next(tuple(map(tuple, entry[1:3])) for entry in found["mismatched_keys"] if str(entry[0]) == reshaped[0])
        others = f"; {len(reshaped) - 1} more do not fit either" if len(reshaped) > 1 else ""
        raise InputError(
            f"Tensor {reshaped[0]} in {path} has shape {shapes[0]}, but its config.json asks for {shapes[1]}{others}."
        )
    unexpected = [name for name in sorted(found["unexpected_keys"]) if not headers.is_meaningless(name)]
    if unexpected and not quantised:
        raise InputError(
            f"{name_some(unexpected, 'has', 'have')} no place in the model that the configuration in {path} describes; "
            "leaving out weights would make the result wrong."
        )
    return loaded


def locate(model: str | Path, *, code: bool = False, only: tuple[str, ...] = ()) -> Path:
    """Return the file of a model, or its folder with a config.json; a model of the hub is fetched by `download`.

    Raises:
        ValueError: (as InputError) there is no such model.
    """
    path = Path(model).expanduser()
    if not path.exists():
        path = download(str(model), code=code, only=only)
    if not path.is_file():
        read_settings(path, code)
    return path


def _fill(checkpoint: Checkpoint, dtype: torch.dtype | None) -> PreTrainedModel:
    """Build a model from the checkpoint's tensors, for files that transformers itself does not load."""
    model = meta_model(checkpoint.config)
    spec = family_of(checkpoint.config.model_type)
    names = expected_tensors(model, spec)
    checkpoint.check(names, spec)
    for name in names:
        tensor = checkpoint.read([name])[name].to(dtype or checkpoint.storage_dtype(name))
        model.load_state_dict({name: tensor}, strict=False, assign=True)
    model.tie_weights()
    embedding = model.get_input_embeddings()
    if hasattr(embedding, "embed_scale"):  # a table that is not stored
        embedding.embed_scale = torch.tensor(embedding_scale(model, spec))
    return model.requires_grad_(False)


def evaluation_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str | None, seq_len: int, max_windows: int | None = None, bos: str = "auto"
) -> torch.Tensor:
    """Read an evaluation text as a stream of token ids.

    Args:
        tokenizer: The model's tokenizer.
        text: A file or a dataset, see `slimllm.calibration.read_texts`; None: the bundled text.
        seq_len, max_windows: Length and number of the windows needed; with None for the number, a file is read whole, and
            a dataset, which may have no end, up to 2048 windows.
        bos: As for `PruneConfig`.

    Returns:
        (num_tokens,) int64.

    Raises:
        ValueError: (as InputError) as for `read_texts`.
    """
    if text is None:
        return tokenize(tokenizer, [bundled_text("evaluation")], bos)
    wanted: float = (max_windows or _DATASET_WINDOWS) * seq_len
    if max_windows is None and Path(text).expanduser().is_file():
        wanted = math.inf
    return tokenize(tokenizer, read_texts(text, wanted, tokenizer=tokenizer), bos)


def perplexity_of(
    model: str | Path,
    token_ids: torch.Tensor,
    *,
    seq_len: int,
    max_windows: int | None,
    bos_token_id: int | None,
    device: str | None,
) -> float:
    """Load a model, compute its `perplexity`, and free its memory."""
    loaded, _ = load(model, device=device)
    value = perplexity(loaded, token_ids, seq_len=seq_len, max_windows=max_windows, bos_token_id=bos_token_id)
    del loaded
    release()
    return value


@share_cores()
@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    token_ids: torch.Tensor,
    *,
    seq_len: int = 128,
    batch_size: int = 8,
    max_windows: int | None = None,
    bos_token_id: int | None = None,
    progress: ProgressCallback | None = None,
) -> float:
    """Compute perplexity: exp of the mean negative log-likelihood of the next token over non-overlapping windows.

    Each window is scored on its own. Its first token (the BOS, if there is one) is only context, so seq_len - 1 tokens of
    each window count. This is the protocol of the SlimLLM paper with seq_len 128, and the common one with 2048.

    Args:
        model: A causal language model.
        token_ids: The text, (num_tokens,) int64; an incomplete window at the end is left out.
        seq_len: Tokens in a window, from 2 to the longest input of the model.
        batch_size: Maximum number of windows in a forward pass; fewer if their logits would take more than 1 GiB or a
            quarter of the free memory. It changes the result by rounding only.
        max_windows: Use only this many windows from the beginning.
        bos_token_id: Token to put at the start of every window, from `slimllm.calibration.window_bos`; None: nothing is
            added.
        progress: Called with a `WindowsScored` after every forward pass.

    Raises:
        ValueError: (as InputError) the text is shorter than a window, a setting is out of range, or the model gives NaN.
    """
    for name, value, least in (("seq_len", seq_len, 2), ("batch_size", batch_size, 1), ("max_windows", max_windows, 1)):
        if value is not None and value < least:
            raise InputError(f"{name} must be at least {least}, got {value}.")
    check_seq_len(seq_len, model.config)
    windows = windows_of(token_ids, seq_len, bos_token_id)[:max_windows]
    if len(windows) == 0:
        raise InputError(f"The text has {len(token_ids)} tokens, fewer than one window of {seq_len}; give more text.")
    entries = model.get_input_embeddings().weight.shape[0]
    if int(windows.max()) >= entries or int(windows.min()) < 0:
        raise InputError(
            f"The text has token {int(windows.max())}, but the model's vocabulary has the tokens 0 to {entries - 1}; "
            "is this the tokenizer of this model?"
        )
    total, scored = 0.0, 0
    for batch in windows.split(min(batch_size, _windows_at_once(model, seq_len))):
        batch = batch.to(model.device)
        logits = model(batch, use_cache=False).logits
        for scores, ids in zip(logits, batch):
            for rows, targets in zip(scores[:-1].split(_SCORED_ROWS), ids[1:].split(_SCORED_ROWS)):
                loss = torch.nn.functional.cross_entropy(rows.float(), targets, reduction="sum")
                total += float(loss.double())
        del logits, scores  # free them before the next ones are computed
        scored += len(batch)
        if progress:
            progress(WindowsScored(scored, len(windows)))
    if math.isnan(total):
        dtype = str(model.dtype).removeprefix("torch.")
        advice = (
            "look for NaN in its weights" if dtype == "float32" else "compute in float32, or look for NaN in its weights"
        )
        raise InputError(f"The model's outputs are NaN when computed in {dtype}; {advice}.")
    return math.exp(min(total / (len(windows) * (seq_len - 1)), 700.0))


def _windows_at_once(model: PreTrainedModel, seq_len: int) -> int:
    """Return how many windows fit in one forward pass, given the memory that their logits take."""
    vocabulary = model.get_output_embeddings()
    entries = model.config.vocab_size if vocabulary is None else vocabulary.weight.shape[0]
    allowed = min(_LOGITS_BYTES, free_bytes(model.device) / 4)
    return max(1, int(allowed // (seq_len * entries * model.dtype.itemsize)))
