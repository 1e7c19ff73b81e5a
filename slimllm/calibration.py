"""Calibration and evaluation text: from a file or a dataset to windows of token ids."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from slimllm.config import PruneConfig
from slimllm.errors import InputError

# A hub dataset is read until it has given this many characters for every token asked for.
_CHARACTERS_PER_TOKEN = 20
# The texts of the papers' perplexities, as LLM-Pruner and SlimLLM take them, by what they are called there; the second is
# only to be had as the hub has converted it, since its own form is code.
NAMED = {
    "wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1:test:text",
    "ptb": "ptb-text-only/ptb_text_only@refs/convert/parquet:penn_treebank:validation:sentence",
}


def bundled_text(name: str) -> str:
    """The text that comes with the package: `calibration` or `evaluation`, two separate parts of War and Peace."""
    return (resources.files("slimllm") / "data" / f"war_and_peace.{name}.txt").read_text(encoding="utf-8")


def read_texts(source: str | Path, tokens_wanted: int) -> list[str]:
    """The documents of a .txt file (one), a .jsonl file (one for each line's "text") or a dataset.

    A dataset is `NAME:CONFIG:SPLIT:COLUMN`, of which all but the name may be left out (the split is then `train` and the
    column `text`); `NAME@REVISION`, a folder of data files, or a name in `NAMED`.

    Raises:
        ValueError: (as InputError) the file or dataset does not exist, or holds no text.
    """
    path = Path(source)
    try:
        if path.suffix == ".jsonl" and path.is_file():
            documents = list(_jsonl_texts(path))
        elif path.is_file():
            documents = [path.read_text(encoding="utf-8")]
        elif "://" in str(source):
            raise InputError(f"{source} is an address; download the text and give the file.")
        elif path.suffix[1:].isalpha() and not path.is_dir():
            raise InputError(f"The text file {source} does not exist.")
        else:
            documents = _dataset_texts(str(source), tokens_wanted * _CHARACTERS_PER_TOKEN)
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"The text in {source} cannot be read: {error}.") from None
    if not any(document.strip() for document in documents):
        raise InputError(f"{source} holds no text.")
    return documents


def _jsonl_texts(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield str(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError):
                raise InputError(f'Line {number} of {path} is not a JSON object with a "text" field.') from None


def _dataset_texts(name: str, characters_wanted: int) -> list[str]:
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"There is no file {name}; to read a dataset of that name, install the extra: "
            "pip install 'slimllm-engine[datasets]'."
        ) from None
    parts = [*(name if Path(name).is_dir() else NAMED.get(name, name)).split(":"), "", "", ""]
    path, _, revision = (parts[0], "", "") if Path(parts[0]).is_dir() else parts[0].partition("@")
    column = parts[3] or "text"
    try:
        stream = datasets.load_dataset(
            path, parts[1] or None, split=parts[2] or "train", streaming=True, revision=revision or None
        )
        texts, characters = [], 0
        for row in stream:
            if column not in row:
                raise InputError(
                    f'The dataset {name} has no column "{column}"; name the one with the text: NAME:CONFIG:SPLIT:COLUMN.'
                )
            texts.append(str(row[column]))
            characters += len(texts[-1])
            if characters >= characters_wanted:
                break
        return texts
    except InputError:
        raise
    except Exception as error:  # datasets raises many types for one fact: it cannot be had
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(f"There is no file {name}, and no dataset of that name can be had: {reason}.") from error


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
        documents = read_texts(config.calibration, config.samples * config.seq_len)
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
