"""Windows of token ids from documents, for every command: this is the only place that makes them."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from slimllm.calibration.bos import about_bos, window_bos
from slimllm.calibration.texts import bundled_text, read_texts
from slimllm.checkpoints.tokenizer import encode
from slimllm.config import PruneConfig
from slimllm.errors import InputError

_log = logging.getLogger("slimllm")


def tokenize(tokenizer: PreTrainedTokenizerBase, documents: list[str], bos: str = "auto") -> torch.Tensor:
    """Make one stream of token ids, (num_tokens,) int64: the documents joined by blank lines and tokenized at once.

    This is the usual protocol of perplexity on data sets by rows, such as WikiText-2.

    Args:
        tokenizer: The model's tokenizer.
        documents: The texts.
        bos: As for `PruneConfig`; with `never` the BOS that the tokenizer puts before the stream is left out.
    """
    ids = encode(tokenizer, "\n\n".join(documents))
    own = bos == "never" and ids[:1] == [window_bos(tokenizer, "auto")]
    return torch.tensor(ids[1:] if own else ids, dtype=torch.int64)


def draw_windows(
    tokens: torch.Tensor, samples: int, seq_len: int, seed: int, bos_token_id: int | None = None
) -> torch.Tensor:
    """Draw calibration windows: `samples` of the windows that `windows_of` gives, without replacement.

    Takes the first `samples` entries of `torch.randperm(num_windows)` by a CPU generator seeded with `seed`, in order.

    Args:
        tokens: (num_tokens,) int64.
        samples: Number of windows.
        seq_len: Tokens per window.
        seed: Seed of the draw.
        bos_token_id: The first token of every window; None: the stream is cut as it is.

    Returns:
        (samples, seq_len) int64.

    Raises:
        ValueError: (as InputError) the text is too short.
    """
    windows = windows_of(tokens, seq_len, bos_token_id)
    if len(windows) < samples:
        raise InputError(
            f"The text has {len(tokens)} tokens, that is {len(windows)} windows of {seq_len}, but {samples} are asked "
            "for; give more text or ask for fewer samples."
        )
    generator = torch.Generator().manual_seed(seed)
    return windows[torch.randperm(len(windows), generator=generator)[:samples]]


def windows_of(tokens: torch.Tensor, seq_len: int, bos_token_id: int | None = None) -> torch.Tensor:
    """Cut a stream into non-overlapping windows from its beginning; the incomplete one at the end is dropped.

    With a BOS every window is that token and seq_len - 1 tokens of the text, so that a model never sees more than seq_len;
    the one BOS that a tokenizer has put before the whole stream is left out.

    Args:
        tokens: (num_tokens,) int64.
        seq_len: Tokens per window, at least 2.
        bos_token_id: The first token of every window; None: the stream is cut as it is.

    Returns:
        (num_windows, seq_len) int64.
    """
    if bos_token_id is not None:
        text = windows_of(tokens[1:] if tokens[:1].eq(bos_token_id).all() else tokens, seq_len - 1)
        return torch.cat([text.new_full((len(text), 1), bos_token_id), text], 1)
    count = len(tokens) // seq_len
    return tokens[: count * seq_len].view(count, seq_len)


@dataclass(frozen=True)
class Calibration:
    """Calibration windows, and what they begin with.

    Attributes:
        token_ids: What the statistics are made of, (samples, seq_len) int64, on the CPU.
        held_out: What they are not made of, (windows, seq_len) int64, on the CPU; the perplexities of a run are of these.
        bos_token_id: The BOS that was put before every window; None: none was.
        given: Whether the user gave the windows as token ids, with whatever they begin with.
    """

    token_ids: torch.Tensor
    held_out: torch.Tensor = field(default_factory=lambda: torch.empty(0, 2, dtype=torch.int64))
    bos_token_id: int | None = None
    given: bool = False

    @property
    def bos(self) -> str:
        """What the windows begin with, in words."""
        return "as given" if self.given else about_bos(self.bos_token_id)


def num_held_out(samples: int) -> int:
    """How many windows are held out of the statistics of so many: a tenth, and two at least."""
    return max(2, -(-samples // 10))


def longest_input(model_config: PretrainedConfig) -> float:
    """Tokens that a model takes at most; inf if it has no bound, like BLOOM."""
    longest: int | None = getattr(model_config, "max_position_embeddings", None)
    return math.inf if longest is None else longest


def check_seq_len(seq_len: int, model_config: PretrainedConfig) -> None:
    """Raise ValueError (as InputError) if a window is longer than the model takes."""
    if seq_len > (longest := longest_input(model_config)):
        raise InputError(f"seq_len is {seq_len}, but the model takes at most {longest} tokens.")


def calibration_windows(
    config: PruneConfig, tokenizer: PreTrainedTokenizerBase | None, model_config: PretrainedConfig
) -> Calibration:
    """Make the windows that the settings ask for, and those that are held out of the statistics.

    Both are of one draw: the windows in the statistics are the same whether any are held out or not. Of windows that the
    user gives none are, nor of a text that has no more than are asked for.

    Raises:
        ValueError: (as InputError) the text cannot be had or is too short, or a window is longer than the model takes.
    """
    if isinstance(config.calibration, torch.Tensor):
        return Calibration(_check_token_ids(config.calibration, model_config), given=True)
    check_seq_len(config.seq_len, model_config)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"expected a tokenizer or a tensor of token ids, got {type(tokenizer).__name__}.")
    if config.calibration is None:
        _log.info("Calibrating on the bundled text (War and Peace); text from your own domain gives a better model.")
        documents = [bundled_text("calibration")]
    else:
        wanted: float = config.samples * config.seq_len
        if config.preset == "paper" and Path(config.calibration).expanduser().is_file():
            wanted = math.inf  # its windows are drawn from the whole text
        documents = read_texts(config.calibration, wanted, seed=config.seed, tokenizer=tokenizer)
    as_published = config.preset == "paper" and config.bos == "auto"
    bos = window_bos(tokenizer, "never" if as_published else config.bos)
    if as_published and window_bos(tokenizer, "auto") is not None:
        _log.info(
            "The preset paper puts no BOS before the calibration windows, as published, though this model's tokenizer adds "
            "one to every text; --bos always puts it there."
        )
    tokens = tokenize(tokenizer, documents, config.bos)
    wanted = num_held_out(config.samples)
    held_out = min(wanted, max(0, len(windows_of(tokens, config.seq_len, bos)) - config.samples))
    if held_out < wanted:
        none = "" if held_out else ", so that its perplexity is of windows it is fitted to"
        _log.info(
            f"The text has {held_out or 'no'} windows beside those for the statistics, where {wanted} would be held out to "
            f"judge the result by{none}; give more text."
        )
    windows = draw_windows(tokens, config.samples + held_out, config.seq_len, config.seed, bos)
    windows = _check_token_ids(windows, model_config)
    return Calibration(windows[: config.samples], windows[config.samples :], bos)


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
