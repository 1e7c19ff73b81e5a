"""Examples to train on: instructions with answers, or windows of text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from slimllm.calibration import tokenize, windows_of
from slimllm.errors import InputError
from slimllm.run import Notice, say_nothing

# Stanford Alpaca's, on which LLM-Pruner and SlimLLM train.
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
    """Token ids, of which the first `given` are not learnt: the instruction."""

    ids: tuple[int, ...]
    given: int = 0


def read_examples(
    data: str | Path, tokenizer: PreTrainedTokenizerBase, seq_len: int, notice: Notice = say_nothing
) -> list[Example]:
    """The examples of a file.

    Args:
        data: FILE.jsonl or FILE.json, of objects with "instruction", "output" and, if it is not empty, "input", as Alpaca
            has them, each of which is an example, whose answer alone is learnt; or of objects with "text"; or FILE.txt.
            Text is cut into windows, all of whose tokens are learnt.
        tokenizer: The model's.
        seq_len: Tokens of an example at most. Longer answers are cut off; what leaves no room for its answer, or has none,
            is left out.
        notice: Told how many are.

    Raises:
        ValueError: (as InputError) there is no such file, it cannot be read, or gives no example.
    """
    path = Path(data).expanduser()
    if not path.is_file():
        raise InputError(f"There is no file {data} to train on; give a .jsonl, .json or .txt file.")
    try:
        is_json = path.suffix in (".jsonl", ".json")
        records = _records(path) if is_json else [{"text": path.read_text(encoding="utf-8")}]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{data} cannot be read: {error}.") from None
    kinds = {"text" if "text" in record else "instruction" for record in records}
    if len(kinds) > 1:
        raise InputError(f'{data} has objects with "text" and others without; give one kind.')
    if kinds == {"text"}:
        windows = windows_of(tokenize(tokenizer, [record["text"] for record in records]), seq_len)
        examples = [Example(tuple(window.tolist())) for window in windows]
    else:
        examples = [one for record in records if (one := _alpaca(record, tokenizer, seq_len))]
        if left_out := len(records) - len(examples):
            notice(f"{left_out} of {len(records)} examples have no answer, or no room for it in {seq_len} tokens.")
    if not examples:
        raise InputError(f"{data} gives no example of {seq_len} tokens; give more text, or another seq_len.")
    return examples


def batch_of(examples: list[Example], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and labels, (examples, tokens) int64 each, padded on the right."""
    length = max(len(example.ids) for example in examples)
    ids, mask = torch.zeros(2, len(examples), length, dtype=torch.int64)
    labels = torch.full_like(ids, _IGNORED)
    for row, example in enumerate(examples):
        own = torch.tensor(example.ids)
        ids[row, : len(own)], mask[row, : len(own)] = own, 1
        labels[row, example.given : len(own)] = own[example.given :]
    return ids.to(device), mask.to(device), labels.to(device)


def learnt(labels: torch.Tensor) -> torch.Tensor:
    """Which positions are predicted, (examples, tokens - 1): those whose next token is learnt."""
    return labels[:, 1:] != _IGNORED


def _records(path: Path) -> list[dict[str, str]]:
    """The objects of a file, of which all that is read is text."""
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix == ".json":
                parsed = json.load(file)
                numbered = list(enumerate(parsed if isinstance(parsed, list) else [], 1))
            else:
                number, numbered = 0, []
                for number, line in enumerate(file, 1):
                    if line.strip():
                        numbered.append((number, json.loads(line)))
    except json.JSONDecodeError as error:
        where = f"Line {number} of {path}" if path.suffix == ".jsonl" else str(path)
        raise InputError(f"{where} is no valid JSON: {error}.") from None
    for number, record in numbered:
        wanted = ("text",) if isinstance(record, dict) and "text" in record else ("instruction", "output")
        if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in wanted):
            raise InputError(
                f'Entry {number} of {path} is not a JSON object with "instruction" and "output", or with "text", as text.'
            )
    if not numbered:
        raise InputError(f"{path} holds no list of JSON objects.")
    return [record for _, record in numbered]


def _alpaca(record: dict[str, str], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Example | None:
    template = _WITH_INPUT if record.get("input") else _ALONE
    prompt = template.format(instruction=record["instruction"], input=record.get("input", ""))
    given = tokenizer(prompt, verbose=False)["input_ids"]
    # Apart from the instruction, so that where it ends is known; the end, if the tokenizer has one, is learnt too.
    answer = tokenizer(record["output"], verbose=False, add_special_tokens=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if len(given) >= seq_len or not answer:
        return None
    return Example(tuple([*given, *answer, *end][:seq_len]), len(given))
