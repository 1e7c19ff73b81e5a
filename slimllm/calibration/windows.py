"""Windows of token ids from documents, for every command: this is the only place that makes them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from slimllm.calibration.texts import bundled_text, read_texts
from slimllm.config import PruneConfig
from slimllm.errors import InputError


def tokenize(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> torch.Tensor:
    """One stream of token ids, (num_tokens,) int64: the documents joined by blank lines and tokenized at once.

    This is the usual protocol of perplexity on data sets by rows, such as WikiText-2.
    """
    ids = tokenizer("\n\n".join(documents), verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def draw_windows(tokens: torch.Tensor, samples: int, seq_len: int, seed: int) -> torch.Tensor:
    """Calibration windows: `samples` of the non-overlapping windows of the stream, drawn without replacement.

    The stream is cut into windows of seq_len tokens from its beginning, the last incomplete one is dropped, and the
    first `samples` entries of `torch.randperm(num_windows)` with a CPU generator seeded with `seed` are taken, in order.

    Args:
        tokens: (num_tokens,) int64.

    Returns:
        (samples, seq_len) int64.

    Raises:
        ValueError: (as InputError) the text is too short.
    """
    windows = windows_of(tokens, seq_len)
    if len(windows) < samples:
        raise InputError(
            f"The text has {len(tokens)} tokens, that is {len(windows)} windows of {seq_len}, but {samples} are asked "
            "for; give more text or ask for fewer samples."
        )
    generator = torch.Generator().manual_seed(seed)
    return windows[torch.randperm(len(windows), generator=generator)[:samples]]


def windows_of(tokens: torch.Tensor, seq_len: int) -> torch.Tensor:
    """All non-overlapping windows of the stream, (num_windows, seq_len); the rest at the end is dropped."""
    count = len(tokens) // seq_len
    return tokens[: count * seq_len].view(count, seq_len)


def longest_input(model_config: PretrainedConfig) -> float:
    """Tokens that a model takes at most; inf if it has no bound, like BLOOM."""
    longest: int | None = getattr(model_config, "max_position_embeddings", None)
    return math.inf if longest is None else longest


def check_seq_len(seq_len: int, model_config: PretrainedConfig) -> None:
    """Raise ValueError (as InputError) if a window is longer than the model takes."""
    if seq_len > (longest := longest_input(model_config)):
        raise InputError(f"seq_len is {seq_len}, but the model takes at most {longest} tokens.")


def calibration_windows(
    config: PruneConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    model_config: PretrainedConfig,
    notice: Callable[[str], None],
) -> torch.Tensor:
    """The windows that the settings ask for, (samples, seq_len) int64.

    Raises:
        ValueError: (as InputError) the text cannot be had or is too short, or a window is longer than the model takes.
    """
    if isinstance(config.calibration, torch.Tensor):
        return _check_token_ids(config.calibration, model_config)
    check_seq_len(config.seq_len, model_config)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"expected a tokenizer or a tensor of token ids, got {type(tokenizer).__name__}.")
    if config.calibration is None:
        notice("Calibrating on the bundled text (War and Peace); text from your own domain gives a better model.")
        documents = [bundled_text("calibration")]
    else:
        documents = read_texts(
            config.calibration, config.samples * config.seq_len, seed=config.seed, tokenizer=tokenizer, notice=notice
        )
    tokens = tokenize(tokenizer, documents)
    return _check_token_ids(draw_windows(tokens, config.samples, config.seq_len, config.seed), model_config)


def _check_token_ids(token_ids: torch.Tensor, model_config: PretrainedConfig) -> torch.Tensor:
    """The token ids, if the model can take them.

    Raises:
        ValueError: (as InputError) wrong shape or dtype, too long, or outside the vocabulary.
    """
    if token_ids.ndim != 2 or token_ids.dtype != torch.int64 or min(token_ids.shape) < 1 or token_ids.shape[1] < 2:
        raise InputError(
            "Calibration token ids must be an int64 tensor (samples, seq_len) with seq_len at least 2, "
            f"got {token_ids.dtype} {tuple(token_ids.shape)}."
        )
    if token_ids.shape[1] > (longest := longest_input(model_config)):
        raise InputError(f"Calibration windows have {token_ids.shape[1]} tokens, but the model takes at most {longest}.")
    if int(token_ids.min()) < 0 or int(token_ids.max()) >= model_config.vocab_size:
        raise InputError(
            f"Calibration token ids run from {int(token_ids.min())} to {int(token_ids.max())}, but the model's "
            f"vocabulary has {model_config.vocab_size}; is this the tokenizer of this model?"
        )
    return token_ids.cpu()


def calibration_name(config: PruneConfig) -> str:
    """What the calibration text was, for reports."""
    return "bundled text (War and Peace)" if config.calibration is None else str(config.to_dict()["calibration"])
