"""What is trained on: instructions with answers, windows of text, and what is neither."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import STORIES

from slimllm import InputError
from slimllm.checkpoint import open_checkpoint
from slimllm.finetune.data import batch_of, learnt, read_examples


def test_instructions(tmp_path: Path) -> None:
    """Of an answer every token and the end are learnt, of its instruction none; long ones are cut."""
    tokenizer = open_checkpoint(STORIES).tokenizer()
    records = [
        {"instruction": "Say hello.", "output": "Hello."},
        {"instruction": "Repeat.", "input": "The dog ran.", "output": "The dog ran. " * 100},
        {"instruction": "word " * 400, "output": "No room."},
    ]
    path = tmp_path / "alpaca.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    short, long = read_examples(path, tokenizer, 200)
    text = tokenizer.decode(short.ids)
    assert "### Instruction:\nSay hello." in text.replace(" ###", "###") and "### Input" not in text
    assert tokenizer.decode(short.ids[short.given : -1]).strip() == "Hello." and short.ids[-1] == tokenizer.eos_token_id
    assert len(long.ids) == 200 and "The dog ran." in tokenizer.decode(long.ids[: long.given])
    ids, mask, labels = batch_of([short, long], torch.device("cpu"))
    assert mask.sum(1).tolist() == [len(short.ids), 200] and ids[0, len(short.ids) :].sum() == 0
    assert learnt(labels).sum(1).tolist() == [len(short.ids) - short.given, 200 - long.given]
    whole_list = tmp_path / "alpaca.json"
    whole_list.write_text(json.dumps(records))
    assert read_examples(whole_list, tokenizer, 200) == [short, long]


def test_what_is_no_example(tmp_path: Path) -> None:
    """Letters that end a line for Python, but not in JSON, are letters; what is left out is counted."""
    tokenizer, path, told = open_checkpoint(STORIES).tokenizer(), tmp_path / "alpaca.jsonl", []
    records = [
        {"instruction": "Say\u2028it\u0085now.", "output": "It."}, {"instruction": "Nothing", "output": ""},
        {"instruction": "word " * 400, "output": "No room."},
    ]  # fmt: skip
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records))
    assert len(read_examples(path, tokenizer, 200, told.append)) == 1
    assert told == ["2 of 3 examples have no answer, or no room for it in 200 tokens."]
    path.write_text('{"text": "one"}\n\n{"text": null}\n')
    with pytest.raises(InputError, match="Entry 3 of"):
        read_examples(path, tokenizer, 200)
    path.write_text('{"text": "one"}\n{"text"}\n')
    with pytest.raises(InputError, match=r"Line 2 of .* is no valid JSON"):
        read_examples(path, tokenizer, 200)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"instruction": "a", "output": "b"}\n{"text": "c"}\n', 'objects with "text" and others without'),
        ('{"instruction": "a"}\n', "Entry 1 of .* is not a JSON object with"),
        ("[1]\n", "Entry 1 of"),
        ("nonsense\n", "no valid JSON"),
        ("", "holds no list of JSON objects"),
        ('{"text": "few words"}\n', "gives no example of 256 tokens"),
    ],
)
def test_data_that_cannot_be(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=sentence):
        read_examples(path, open_checkpoint(STORIES).tokenizer(), 256)
