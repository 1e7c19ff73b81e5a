"""Windows of token ids made from documents; every command gets its windows here."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from slimllm.calibration.bos import about_bos, window_bos
from slimllm.calibration.files import shown
from slimllm.calibration.mixture import BUNDLED, Source, apportioned, mixed, sources_of
from slimllm.calibration.texts import bundled_text, read_texts
from slimllm.checkpoints.tokenizer import encode
from slimllm.config import PruneConfig
from slimllm.errors import InputError

_log = logging.getLogger("slimllm")

SAMPLES = 32  # windows, unless the settings say otherwise


def tokenize(tokenizer: PreTrainedTokenizerBase, documents: list[str], bos: str = "auto") -> torch.Tensor:
    """Join documents by blank lines and tokenize them into one stream of token ids, (num_tokens,) int64.

    This is the usual protocol for the perplexity on data sets made of rows, such as WikiText-2.

    Args:
        tokenizer: The model's tokenizer.
        documents: The texts.
        bos: As for `PruneConfig`; with `never` the BOS that the tokenizer puts before the stream is removed.
    """
    ids = encode(tokenizer, "\n\n".join(documents))
    own = bos == "never" and ids[:1] == [window_bos(tokenizer, "auto")]
    return torch.tensor(ids[1:] if own else ids, dtype=torch.int64)


def draw_windows(
    tokens: torch.Tensor, samples: int, seq_len: int, seed: int, bos_token_id: int | None = None
) -> torch.Tensor:
    """Draw `samples` of the windows that `windows_of` returns, without replacement.

    They are the first `samples` entries of `torch.randperm(num_windows)`, drawn by a CPU generator seeded with `seed`, in
    that order.

    Args:
        tokens: (num_tokens,) int64.
        samples: Number of windows.
        seq_len: Tokens per window.
        seed: Seed of the draw.
        bos_token_id: Token to put at the start of every window; None: nothing is added.

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
    """Cut a stream into non-overlapping windows from its beginning, and drop the incomplete one at the end.

    With a BOS, every window is that token and seq_len - 1 tokens of the text, so that a model never sees more than seq_len
    tokens. A BOS that the tokenizer put before the whole stream is removed first.

    Args:
        tokens: (num_tokens,) int64.
        seq_len: Tokens per window, at least 2.
        bos_token_id: Token to put at the start of every window; None: nothing is added.

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
    """Calibration windows and held-out windows.

    Attributes:
        token_ids: Windows that the statistics are computed from, (samples, seq_len) int64, on the CPU.
        held_out: Windows that the perplexities of a run are computed on, (windows, seq_len) int64, on the CPU.
        bos_token_id: BOS that was put before every window; None: no BOS was added.
        given: Whether the user gave the windows as token ids, which may or may not begin with a BOS.
    """

    token_ids: torch.Tensor
    held_out: torch.Tensor = field(default_factory=lambda: torch.empty(0, 2, dtype=torch.int64))
    bos_token_id: int | None = None
    given: bool = False

    @property
    def bos(self) -> str:
        """Whether the windows begin with a BOS, in words."""
        return "as given" if self.given else about_bos(self.bos_token_id)


def num_held_out(samples: int) -> int:
    """Return how many windows are held out in addition to `samples` calibration windows: a tenth of them, at least two."""
    return max(2, -(-samples // 10))


def longest_input(model_config: PretrainedConfig) -> float:
    """Return the maximum number of tokens that a model accepts; inf if there is no limit, as for BLOOM."""
    longest: int | None = getattr(model_config, "max_position_embeddings", None)
    return math.inf if longest is None else longest


def check_seq_len(seq_len: int, model_config: PretrainedConfig) -> None:
    """Raise ValueError (as InputError) if a window has more tokens than the model accepts."""
    if seq_len > (longest := longest_input(model_config)):
        raise InputError(f"seq_len is {seq_len}, but the model takes at most {longest} tokens.")


def calibration_windows(
    config: PruneConfig, tokenizer: PreTrainedTokenizerBase | None, model_config: PretrainedConfig, samples: int = SAMPLES
) -> Calibration:
    """Make the calibration windows that the settings ask for, and the held-out windows.

    Both come from one draw, so the calibration windows do not depend on how many are held out. No windows are held out if
    the user gives token ids, or if the text has no more windows than `samples`.

    Args:
        config: The settings.
        tokenizer: The model's tokenizer; None: the settings have token ids.
        model_config: The model's configuration.
        samples: Number of windows if the settings leave it open; a shorter text gives fewer, but at least SAMPLES.

    Raises:
        ValueError: (as InputError) the text cannot be read or is too short, or a window is longer than the model accepts.
    """
    if isinstance(config.calibration, torch.Tensor):
        return Calibration(_check_token_ids(config.calibration, model_config), given=True)
    check_seq_len(config.seq_len, model_config)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"expected a tokenizer or a tensor of token ids, got {type(tokenizer).__name__}.")
    as_published = config.preset == "paper" and config.bos == "auto"
    bos = window_bos(tokenizer, "never" if as_published else config.bos)
    if as_published and window_bos(tokenizer, "auto") is not None:
        _log.info(
            "The preset paper puts no BOS before the calibration windows, as published, although this model's tokenizer "
            "adds one to every text; give --bos always to add it."
        )
    sources, samples = sources_of(config.calibration), config.samples or samples
    texts = [
        tokenize(tokenizer, _documents(config, source.name, samples * source.share, tokenizer), config.bos)
        for source in sources
    ]
    there = [len(windows_of(text, config.seq_len, bos)) for text in texts]
    if config.samples is None:
        enough = min(int(count / source.share) for count, source in zip(there, sources))
        if enough < (most := samples) + num_held_out(samples):
            samples = max(min(samples, SAMPLES), enough - num_held_out(enough))
            if samples < most:
                _log.info(f"The text gives {samples} calibration windows; the methods should have {most}: give more text.")
    numbers, wanted = apportioned(samples, sources), num_held_out(samples)
    if len(sources) > 1:
        _check_parts(sources, numbers, there)
        parts = [f"{number} of {_shown(source)}" for source, number in zip(sources, numbers)]
        _log.info(f"Calibrating on {samples} windows: {', '.join(parts)}.")
    elif sources[0].name is None:
        _log.info("Calibrating on the bundled text; text from your own domain gives a better model.")
    elif config.preset != "paper":
        name = sources[0].name
        _log.info(
            f"Calibrating on {name} alone; with --calibration {name}:0.75 --calibration {BUNDLED}:0.25 the result loses "
            "less on other kinds of text."
        )
    held_out = [
        min(some, max(0, count - number)) for some, count, number in zip(apportioned(wanted, sources), there, numbers)
    ]
    if sum(held_out) < wanted and there[0] >= numbers[0]:  # or else there is an error
        none = "" if sum(held_out) else ", so perplexity is measured on the windows that the model is fitted to"
        _log.info(
            f"The text has {sum(held_out) or 'no'} windows beyond those for the statistics, but {wanted} should be held "
            f"out to measure the result{none}; give more text."
        )
    drawn = [
        draw_windows(text, number + rest, config.seq_len, config.seed, bos)
        for text, number, rest in zip(texts, numbers, held_out)
    ]
    windows = mixed([one[:number] for one, number in zip(drawn, numbers)], config.seed)
    rest = mixed([one[number:] for one, number in zip(drawn, numbers)], config.seed)
    windows = _check_token_ids(torch.cat([windows, rest]), model_config)
    return Calibration(windows[:samples], windows[samples:], bos)


def _check_parts(sources: list[Source], numbers: list[int], there: list[int]) -> None:
    """Raise ValueError (as InputError) if one of several texts gives no window, or has fewer than it should give."""
    for source, number, count in zip(sources, numbers, there):
        name = _shown(source)
        if not number:
            raise InputError(
                f"Calibration text {name} gives none of the {sum(numbers)} windows; give a larger share or more samples."
            )
        if count < number:
            raise InputError(
                f"Calibration text {name} has {count} windows, but {number} of the {sum(numbers)} should be of it; give "
                "more text, a smaller share or fewer samples."
            )


def _shown(source: Source) -> str:
    return BUNDLED if source.name is None else shown(source.name)


def _documents(
    config: PruneConfig, name: str | Path | None, samples: float, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Read a text of the settings, with enough for a number of windows."""
    if name is None:
        return [bundled_text("novel" if config.preset == "paper" else "calibration")]  # the results of paper never change
    wanted = samples * config.seq_len
    if config.preset == "paper" and Path(name).expanduser().is_file():
        wanted = math.inf  # this preset draws its windows from the whole text
    return read_texts(name, wanted, seed=config.seed, tokenizer=tokenizer)


def _check_token_ids(token_ids: torch.Tensor, model_config: PretrainedConfig) -> torch.Tensor:
    """Return the token ids on the CPU after checking that the model accepts them.

    Raises:
        ValueError: (as InputError) wrong shape or dtype, windows too long, or ids outside the vocabulary.
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
    """Return the name of the calibration text, for reports."""
    if config.token_ids is not None:
        return str(config.to_dict()["calibration"])
    sources = sources_of(config.calibration)
    names = ["bundled text" if source.name is None else str(source.name) for source in sources]
    if len(names) == 1:
        return names[0]
    return ", ".join(f"{source.share:.0%} {name}" for name, source in zip(names, sources))
