"""What is trained on: instructions with answers, windows of text, and what is neither."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORIES

from slimllm import InputError
from slimllm.checkpoints.opening import open_checkpoint
from slimllm.finetuning.data import batch_of, learnt, read_examples


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


def test_what_is_no_example(tmp_path: Path, told: list[str]) -> None:
    """Letters that end a line for Python, but not in JSON, are letters; what is left out is counted."""
    tokenizer, path = open_checkpoint(STORIES).tokenizer(), tmp_path / "alpaca.jsonl"
    records = [
        {"instruction": "Say\u2028it\u0085now.", "output": "It."},
        {"instruction": "Nothing", "output": ""},
        {"instruction": "word " * 400, "output": "No room."},
    ]
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records))
    assert len(read_examples(path, tokenizer, 200)) == 1
    assert told == ["2 of 3 examples have no answer, or no room for it in 200 tokens."]
    path.write_text('{"text": "one"}\n\n{"text": 5}\n')
    with pytest.raises(InputError, match="Entry 3 of"):
        read_examples(path, tokenizer, 200)
    path.write_text('{"text": "one"}\n{"text"}\n')
    with pytest.raises(InputError, match=r"Line 2 of .* is not valid JSON"):
        read_examples(path, tokenizer, 200)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"instruction": "a", "output": "b"}\n{"text": "c"}\n', 'objects with "text" and others without'),
        ('{"instruction": "a"}\n', "Entry 1 of .* is not a JSON object with"),
        ("[1]\n", "Entry 1 of"),
        ("nonsense\n", "not valid JSON"),
        ("", "holds no list of JSON objects"),
        ('{"text": "few words"}\n', "gives no example of 256 tokens"),
        ('{"instruction": "a", "output": 3}\n', "Entry 1 of"),
        ('{"instruction": "a", "input": [1], "output": "b"}\n', "Entry 1 of"),
        ('{"instruction": "a", "output": null}\n', "gives no example of 256 tokens"),
        ('{"instruction": "a\\udfff", "output": "b"}\n', "gives no example of 256 tokens"),
        ('{"conversations": [{"from": "human", "value": "a"}]}\n', r'"messages" \(it has the fields "conversations"\)'),
        ('{"prompt": "a", "completion": "b"}\n', r'it has the fields "prompt", "completion"'),
        ('{"messages": [{"role": "user"}]}\n', 'has "messages" that are not a list of objects'),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
            "has no chat template",
        ),
        ('{"messages": []}\n{"instruction": "a", "output": "b"}\n', 'objects with "messages" and others without'),
    ],
)
def test_data_that_cannot_be(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=sentence):
        read_examples(path, open_checkpoint(STORIES).tokenizer(), 256)


def test_what_is_null_or_not_unicode(tmp_path: Path, told: list[str]) -> None:
    """Nothing for an input is no input; without an answer there is nothing to learn."""
    tokenizer, path = open_checkpoint(STORIES).tokenizer(), tmp_path / "alpaca.txt"
    given = {"instruction": "Say hello.", "output": "Hello."}
    records = [
        given,
        {**given, "input": None},
        {**given, "output": None},
        {"instruction": "None."},
        {**given, "input": "\ud800"},
    ]
    path.write_bytes(gzip.compress(("\ufeff" + "\n".join(map(json.dumps, records))).encode()))
    first, second = read_examples(path, tokenizer, 200)
    assert first == second and "Input" not in tokenizer.decode(first.ids)
    assert told == [
        "1 of 5 examples are not valid Unicode and are left out.",
        "2 of 5 examples have no answer, or no room for it in 200 tokens.",
    ]
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": null}\n' + json.dumps({"text": "Once upon a time there was a dog. " * 9}))
    assert read_examples(texts, tokenizer, 16) and "1 of 2 examples have no text" in told[-1]
    table = tmp_path / "alpaca.csv"
    table.write_text("instruction,input,output\nSay hello.,,Hello.\n")
    assert read_examples(table, tokenizer, 200) == [first]


@pytest.mark.parametrize("end", ["{{ eos_token }}\n", "<end>\n"])
def test_conversations(end: str, tmp_path: Path, told: list[str]) -> None:
    """The last answer is learnt, with what the template writes after it, and all that is before it is given."""
    tokenizer = open_checkpoint(STORIES).tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}" + end + "{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )

    def said(*contents: str) -> dict[str, Any]:
        roles = ["user", "assistant"] * 2
        return {"messages": [{"role": role, "content": content} for role, content in zip(roles, contents)]}

    records = [
        said("a", "b", "c", "d"),
        said("a", "b", "c"),
        said("a"),
        said("a", " "),
        {"messages": None},
        said("a", "\ud800"),
    ]
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(records))
    two, one = read_examples(path, tokenizer, 200)
    assert told == [
        "1 of 6 examples are not valid Unicode and are left out.",
        "3 of 6 examples have no answer, or no room for it in 200 tokens.",
    ]
    mark = "" if "eos" in end else "<end>"
    for example, answer in ((two, "d"), (one, "b")):
        assert tokenizer.decode(example.ids[example.given :]).strip() == answer + mark + tokenizer.eos_token
        assert example.ids.count(tokenizer.bos_token_id) == 1 == example.ids[0]
    given = tokenizer.decode(two.ids[: two.given])
    assert [given.count(part) for part in ("[user] a", "[assistant] b", "[user] c")] == [1, 1, 1]
