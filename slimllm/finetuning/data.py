"""Training examples: instructions with answers, conversations, or windows of text."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from slimllm.calibration import (
    check_messages,
    check_regular,
    fields_of,
    has_empty,
    is_unicode,
    recognise,
    rendered,
    shown,
    tokenize,
    window_bos,
    windows_of,
)
from slimllm.checkpoints.tokenizer import encode
from slimllm.errors import InputError

_log = logging.getLogger("slimllm")
# Templates of Stanford Alpaca, on which LLM-Pruner and SlimLLM train.
_ALONE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_IGNORED = -100


@dataclass(frozen=True)
class Example:
    """Token ids of an example; the first `given`, the instruction, are not learnt."""

    ids: tuple[int, ...]
    given: int = 0


def read_examples(data: str | Path, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> list[Example]:
    """Read the examples of a file.

    Args:
        data: A file of JSON lines, a JSON list, a table (.csv, .tsv) or plain text, also compressed with gzip or zstd. All
            objects have fields of one kind:
            "instruction", "output" and optionally "input", as in Alpaca: only the output is learnt;
            "messages": the last message of the role "assistant" is learnt, and those before it are given, all as the
            model's chat template renders them;
            "text": all texts are cut into windows, all of whose tokens are learnt.
        tokenizer: The model's tokenizer.
        seq_len: Maximum number of tokens in an example. Longer answers are cut off. Examples without an answer or without
            room for it, and those that are not valid Unicode, are left out; their number is logged.

    Raises:
        ValueError: (as InputError) there is no such file, it cannot be read, or it yields no example.
    """
    path, name = Path(os.path.expanduser(data)), shown(data)
    try:
        check_regular(path)
        if not path.is_file():
            raise InputError(f"There is no file {name} to train on; give a .jsonl, .json or .txt file.")
        file = recognise(path)
        numbered = [(1, {"text": file.text()})] if file.kind == "text" else list(file.entries())
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}.") from None
    records = _checked(numbered, name)
    clean = [(number, record) for number, record in records if is_unicode(_everything(record))]
    if broken := len(records) - len(clean):
        _log.warning("%d of %d examples are not valid Unicode and are left out.", broken, len(records))
    kinds = {_kind(record) for _, record in records}
    if len(kinds) > 1:
        kind = "text" if "text" in kinds else "messages"
        raise InputError(f'{name} has objects with "{kind}" and others without; give one kind.')
    if kinds == {"text"}:
        texts = [record["text"] for _, record in clean if record["text"]]
        if empty := len(clean) - len(texts):
            _log.warning("%d of %d examples have no text and are left out.", empty, len(records))
        stream = tokenize(tokenizer, texts)
        windows = windows_of(stream, seq_len, window_bos(tokenizer, "auto"))
        examples = [Example(tuple(window.tolist())) for window in windows]
    else:
        make = _conversation if kinds == {"messages"} else _alpaca
        examples = [
            one for number, record in clean if (one := make(record, f"Entry {number} of {name}", tokenizer, seq_len))
        ]
        if left_out := len(clean) - len(examples):
            _log.warning(
                "%d of %d examples have no answer, or no room for it in %d tokens.", left_out, len(records), seq_len
            )
    if not examples:
        raise InputError(f"{name} gives no example of {seq_len} tokens; give more text, or another seq_len.")
    return examples


def batch_of(examples: list[Example], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return token ids, attention mask and labels, each (examples, tokens) int64, padded on the right."""
    length = max(len(example.ids) for example in examples)
    ids, mask = torch.zeros(2, len(examples), length, dtype=torch.int64)
    labels = torch.full_like(ids, _IGNORED)
    for row, example in enumerate(examples):
        own = torch.tensor(example.ids)
        ids[row, : len(own)], mask[row, : len(own)] = own, 1
        labels[row, example.given : len(own)] = own[example.given :]
    return ids.to(device), mask.to(device), labels.to(device)


def learnt(labels: torch.Tensor) -> torch.Tensor:
    """Return a mask, (examples, tokens - 1) bool, of the positions whose next token is learnt."""
    return labels[:, 1:] != _IGNORED


def _kind(record: dict[str, Any]) -> str:
    return next((kind for kind in ("text", "messages") if kind in record), "instruction")


def _checked(numbered: list[tuple[int, Any]], name: str) -> list[tuple[int, dict[str, Any]]]:
    """Check that the records are objects of a known kind, and return them. Some answers may be missing, but not all."""
    if not numbered:
        raise InputError(f"{name} holds no list of JSON objects.")
    answered = any(isinstance(record, dict) and "output" in record for _, record in numbered)
    for number, record in numbered:
        fields: dict[str, Any] = record if isinstance(record, dict) else {}
        # Messages are checked where they are rendered.
        wanted = {"text": ("text",), "messages": (), "instruction": ("instruction",)}[_kind(fields)]
        optional = ("input", "output") if wanted == ("instruction",) else ()
        # A text may be null; it is then left out.
        strings = all(isinstance(fields.get(field), str | None if field == "text" else str) for field in wanted)
        strings = strings and all(isinstance(fields.get(field), str | None) for field in optional)
        if not strings or not isinstance(record, dict) or (optional and not answered):
            has = f" (it has {fields_of(record)})" if isinstance(record, dict) else ""
            raise InputError(
                f'Entry {number} of {name} is not a JSON object with the strings "instruction" and "output", or with the '
                f'string "text", or with "messages"{has}.'
            )
    return numbered


def _everything(record: dict[str, Any]) -> str:
    """Join all strings that are read from a record."""
    fields = ("text", "instruction", "input", "output")
    messages = record.get("messages")
    parts = [record.get(field) for field in fields] + [
        message.get(field)
        for message in (messages if isinstance(messages, list) else [])
        if isinstance(message, dict)
        for field in ("role", "content")
    ]
    return "".join(part for part in parts if isinstance(part, str))


def _alpaca(record: dict[str, Any], where: str, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Example | None:
    template = _WITH_INPUT if record.get("input") else _ALONE
    prompt = template.format(instruction=record["instruction"], input=record.get("input"))
    return _example(prompt, record.get("output") or "", tokenizer, seq_len)


def _conversation(record: dict[str, Any], where: str, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Example | None:
    messages = record["messages"]
    if messages is None or has_empty(messages):
        return None
    check_messages(messages, where)
    last = max((at for at, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    answer = messages[last]["content"]
    if last == 0 or not answer.strip():
        return None
    given = rendered(messages[:last], tokenizer, where, answer=True) or ""
    whole = rendered(messages[: last + 1], tokenizer, where) or ""
    # Include what the template writes after an answer, which the model must learn. Some templates also change the text
    # before the answer; the answer then stays as given.
    if whole.startswith(given):
        answer = whole[len(given) :].rstrip()
    return _example(given, answer.removesuffix(tokenizer.eos_token or ""), tokenizer, seq_len)


def _example(prompt: str, output: str, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Example | None:
    given = encode(tokenizer, prompt)
    # Tokenized apart from the instruction, so that the border is known. The end token, if there is one, is learnt too.
    answer = encode(tokenizer, output, special_tokens=False)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if len(given) >= seq_len or not answer:
        return None
    return Example(tuple([*given, *answer, *end][:seq_len]), len(given))
