"""Files of text: what they are recognised as, what is taken of them, and what is refused in a sentence."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import random
import re
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import slimllm
from slimllm import InputError, PruneConfig
from slimllm.calibration import calibration_windows, draw_windows, read_texts, tokenize
from slimllm.checkpoints.opening import open_checkpoint
from slimllm.evaluation.perplexity import evaluation_tokens

BLOCK = 2**16
MIB = 2**20
TWO = [{"text": "One."}, {"text": "Two.", "n": 1}]
LINES = "\n".join(map(json.dumps, TWO)) + "\n"
LIST = json.dumps(TWO, indent=1)
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
TALK = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]


@pytest.fixture
def tokenizer(stories_path: Path) -> Any:
    tokenizer = open_checkpoint(stories_path).tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("change", [str.encode, lambda text: gzip.compress(text.encode())], ids=["plain", "gzip"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "bom"])
@pytest.mark.parametrize(
    ("names", "content", "documents"),
    [
        (["a.json", "a.ndjson", "a.JSONL", "a.txt", "a", "a.json.gz"], LINES, ["One.", "Two."]),
        (["a.jsonl"], "\n" + LINES.replace("\n", "\r\n\r\n"), ["One.", "Two."]),
        (["a.json", "a.jsonl", "a.txt", "a"], LIST, ["One.", "Two."]),
        (["a.json"], '{\n "text": "One."\n}', ["One."]),
        (["a.txt"], '{"text": "One."}', ["One."]),
        (["a.csv", "a.CSV"], 'n,text\n1,"One, ""two"",\nthree."\n\n2,Four.\n', ['One, "two",\nthree.', "Four."]),
        (["a.tsv", "a.tsv.gz"], "text\tn\nOne, two.\t1\n", ["One, two."]),
        (["a.txt", "a.md", "a"], "One.\r\nTwo.", ["One.\nTwo."]),
        (["a.txt"], "{braces} are text\n", ["{braces} are text\n"]),
        (["a.txt"], '{"a": 1}\nis an object.', ['{"a": 1}\nis an object.']),
        (["a.txt"], '[1] A footnote\n[{"a": 1}]', ['[1] A footnote\n[{"a": 1}]']),
        (["a.txt"], '[{"a": 1}] is a list.', ['[{"a": 1}] is a list.']),
    ],
)
def test_content_decides(
    names: list[str], content: str, documents: list[str], mark: str, change: Callable[[str], bytes], tmp_path: Path
) -> None:
    for name in names:
        assert read_texts(written(tmp_path, name, change(mark + content)), 10) == documents, name


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.json", "nonsense", "Line 1 of .*a.json is not valid JSON"),
        ("a.jsonl", LINES + '{"text": "cut o', "Line 3 of .*a.jsonl is not valid JSON"),
        ("a.ndjson", "One.\nTwo.", "Line 1 of .*is not valid JSON"),
        ("a.json", '[{"text": "One."},\n{"text"]', "Line 2 of .*is not valid JSON"),
        ("a.json", "[" * 100_000, "is not valid JSON"),
        ("a.jsonl", '{"text": ' + "1" * 5000 + "}", "is not valid JSON"),
        ("a.csv", "id,body\n1,One.\n", 'the fields "id", "body"; a field "text"'),
        ("a.csv", "text\nOne, two.\n", "Entry 1 of .*has 2 fields, but the header has 1"),
        ("a.csv", 'text\n"One.\nTwo.\n', "not a row of a table"),
        ("a.json", '["One."]', 'Entry 1 of .*is a string, not a JSON object with a "text"'),
        ("a.jsonl", '{"text": 3.5}', 'Line 1 of .*has a number as "text"'),
        ("a.jsonl", LINES + json.dumps({"text": TALK}), 'Line 3 of .*has a list as "text"'),
        ("a.jsonl", '{"text": {"a": 1}}', 'has an object as "text"'),
        ("a.jsonl", '{"text": true}', 'has true or false as "text"'),
        ("a.jsonl", '{"content": "a", "\\ud800": 1}', r'the fields "content", "\\ud800"; a field "text" .* "messages"'),
        ("a.jsonl", LINES + '{"n": 1}\n{"words": "b"}\n', 'Line 4 of .*has the fields "words"; a field "text"'),
        ("a.jsonl", '{"text": null}\n' * 3, "holds no text"),
        ("a.jsonl", '{"text": "\\ud800"}', "holds no text"),
        ("a.jsonl", "", "holds no text"),
        ("a.txt", "One.".encode("utf-16"), "is UTF-16, not UTF-8; convert it: iconv -f UTF-16 "),
        ("a.txt", "One.".encode("utf-32"), "is UTF-32, not UTF-8; convert it: iconv -f UTF-32 "),
        ("a.csv", "text\nOne.".encode("utf-16-be"), "is UTF-16BE"),
        ("a.jsonl", LINES.encode("utf-16-le"), "is UTF-16LE"),
        ("a.txt", "One.".encode("utf-32-le"), "is UTF-32LE"),
        ("a.txt", "One. \0 Two.", "holds NUL bytes"),
        ("a.txt", "One. " * 20_000 + "\0", "holds NUL bytes"),
        ("a.csv", "text\n" + "One. \n" * 20_000 + "\0", "holds NUL bytes"),
        ("a.txt", b"caf\xe9", "is not UTF-8 .*0xe9.* iconv"),
        ("a.txt", b"PAR1\x15\x04", "a Parquet file; put it into a folder and give the folder"),
        ("a.jsonl", b"PK\x03\x04\x14", "a zip archive; unpack it"),
        ("a.xz", b"\xfd7zXZ\x00\x00", "compressed with xz; decompress it"),
        ("a.txt.bz2", b"BZh91AY&SY\x00", "compressed with bzip2; decompress it"),
        ("a.tar.gz", gzip.compress(b"a.txt".ljust(257, b"\0") + b"ustar", mtime=0), "a tar archive"),
        ("a.gz", gzip.compress(random.Random(0).randbytes(500).hex().encode(), mtime=0)[:-30], "damaged or truncated"),
        ("a.gz", b"\x1f\x8b\x08\x00" + b"x" * 100, "damaged or truncated"),
    ],
)
def test_what_is_no_text(name: str, content: str | bytes, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=sentence) as error:
        read_texts(written(tmp_path, name, content), 10)
    assert "Traceback" not in str(error.value) and "{'" not in str(error.value) and "None" not in str(error.value)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "empty").mkdir()
    for source, sentence in {
        "/dev/null": "a device or a pipe",
        str(tmp_path / "pipe"): "a device or a pipe",
        str(tmp_path / "link"): "a link to nowhere, which does not exist",
        str(tmp_path / "empty"): "The folder .* cannot be read as a dataset: .*data files",
        "foo.gz": "The text file foo.gz does not exist",
        "~nobody-of-that-name/a.txt": "does not exist",
        "x" * 5000 + ".txt": "File name too long",
        "": "name of the text is empty",
        os.fsdecode(b"caf\xe9.txt"): r"The text file caf\\udce9.txt does not exist",
    }.items():
        with pytest.raises(InputError, match=sentence) as error:
            read_texts(source, 10)
        str(error.value).encode()  # can be printed


def test_a_name_with_other_bytes(tmp_path: Path, stories_path: Path) -> None:
    """All that is written about the run can be written."""
    path = written(tmp_path, os.fsdecode(b"caf\xe9.txt"), "A cat sat on a mat. " * 100)
    slimllm.prune(stories_path, tmp_path / "out", PruneConfig(0.2, "slimllm", calibration=path, samples=4, seq_len=32))
    assert r"caf\udce9.txt" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("library", [None, "zstandard", "compression.zstd"])
def test_zstd(library: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"zstandard", "compression.zstd"}
    for name in names - {library}:
        monkeypatch.setitem(sys.modules, name, None)
    if library is None:
        with pytest.raises(InputError, match=r"compressed with zstd; install .*zstandard\), or decompress it"):
            read_texts(written(tmp_path, "a.jsonl.zst", b"\x28\xb5\x2f\xfd\x00"), 10)
        return
    if importlib.util.find_spec(library.split(".")[0]) is None:
        pytest.skip(f"{library} is not installed")
    compress = importlib.import_module(library).compress
    content = compress(LINES.encode()) + compress(b'{"text": "Three."}')
    assert read_texts(written(tmp_path, "a.jsonl.zst", content), 10) == ["One.", "Two.", "Three."]
    with pytest.raises(InputError, match="damaged or truncated"):
        read_texts(written(tmp_path, "a.jsonl.zst", b"\x28\xb5\x2f\xfd" + b"x" * 100), 10)


def test_what_is_skipped_is_counted(tmp_path: Path, told: list[str]) -> None:
    """Some writers leave out what is null, also in the first object."""
    content = '{"n": 1}\n{"text": null}\n' + LINES + '{"text": ""}\n{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n'
    assert read_texts(written(tmp_path, "a.jsonl", content), 10) == ["One.", "Two.", "", "\U0001f600"]
    assert [sentence.partition(" (")[0] for sentence in told] == [
        "2 of 7 documents have no text and are skipped",
        "1 of 7 documents are not valid Unicode and are skipped",
    ]
    told.clear()
    assert read_texts(written(tmp_path, "a.csv", "text,n\n,1\nOne.,2\n"), 10) == ["One."]
    assert told[0].startswith("1 of 2 documents have no text")


def test_conversations(tmp_path: Path, tokenizer: Any, told: list[str]) -> None:
    """They are written by the model's template, without its beginning of sequence, which windows have anyway."""
    bad = [{"messages": None}, {"messages": []}, {"messages": [{"role": "user", "content": "\ud800"}]}]
    path = written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, [{"messages": TALK}, *bad, *TWO])))
    wanted = ["[user] Hi.</s>\n[assistant] Hello.</s>\n", "One.", "Two."]
    assert read_texts(path, 10, tokenizer=tokenizer) == wanted
    assert [re.sub(r" \(.*", "", sentence) for sentence in told] == [
        "2 of 6 documents have no text and are skipped",
        "1 of 6 documents are not valid Unicode and are skipped",
    ]


@pytest.mark.parametrize(
    ("messages", "template", "sentence"),
    [
        (TALK, None, "the model's tokenizer has no chat template"),
        ([{"role": "tool", "content": "x"}], CHAT, "template does not take the messages of Entry 1 of .*: no tools"),
        (TALK, "{% broken", "template does not take the messages"),
        (TALK, "{{ ''.__class__.__mro__ }}", "template does not take the messages"),
        (["Hi."], CHAT, 'not a list of objects with "role" and "content"'),
        ([{"from": "human", "value": "Hi."}], CHAT, 'not a list of objects with "role" and "content"'),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi."}]}], CHAT, "as strings"),
        ("Hi.", CHAT, "not a list of objects"),
    ],
)
def test_conversations_that_cannot_be(
    messages: Any, template: str | None, sentence: str, tmp_path: Path, tokenizer: Any
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=sentence):
        read_texts(written(tmp_path, "a.json", json.dumps([{"messages": messages}])), 10, tokenizer=tokenizer)


def test_rows_of_datasets(tmp_path: Path, tokenizer: Any, told: list[str]) -> None:
    """They are held to what objects in files are."""
    for name, rows in {
        "nulls": [{"text": None}, {"text": "One."}],
        "numbers": [{"text": 1}],
        "talks": [{"messages": TALK}],
        "others": [{"body": "One."}],
    }.items():
        (tmp_path / name).mkdir()
        written(tmp_path / name, "train.jsonl", "\n".join(map(json.dumps, rows)))
    assert read_texts(tmp_path / "nulls", 10) == ["One."] and told[0].startswith("1 of 2 documents")
    talk = ["[user] Hi.</s>\n[assistant] Hello.</s>\n"]
    assert read_texts(tmp_path / "talks", 10, tokenizer=tokenizer) == talk
    assert read_texts(f"{tmp_path / 'talks'}:::messages", 10, tokenizer=tokenizer) == talk
    with pytest.raises(InputError, match=r'Row 1 of .*has a number as "text"'):
        read_texts(tmp_path / "numbers", 10)
    with pytest.raises(InputError, match=r'no column "text".*it has the fields "body"'):
        read_texts(tmp_path / "others", 10)


def sentences(number: int, letters: str = "abcdefghij") -> str:
    """Twelve characters of words for every number, all of them different."""
    return " ".join(f"{letters[i % len(letters)]}{i:09}w" for i in range(number))


def draw(size: int, seed: int, characters: int = 2 * MIB) -> list[int]:
    """Blocks by the documented rule, if each has about as many characters as bytes."""
    count = -(-size // BLOCK)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()[: -(-characters // BLOCK) + 1]


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 MB of different words."""
    return written(tmp_path_factory.mktemp("long"), "long.txt", sentences(1_000_000))


def test_a_long_text_is_drawn_from(long_text: Path) -> None:
    tracemalloc.start()
    pieces = read_texts(long_text, 128, seed=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * MIB and 2 * MIB <= sum(map(len, pieces)) < 2.2 * MIB
    whole = long_text.read_text()
    assert all(piece in whole and set(map(len, piece.split())) == {11} for piece in pieces)
    blocks = [whole.index(piece) // BLOCK for piece in pieces]
    assert blocks == sorted(draw(len(whole), 3)) and len(pieces) == 33  # the borders cut words, so one more than 32
    # All but the words that the borders cut.
    assert all(BLOCK - 22 <= len(piece) <= BLOCK for piece in pieces)
    assert read_texts(long_text, 128, seed=3) == pieces != read_texts(long_text, 128, seed=4)


def test_a_long_text_from_its_beginning(long_text: Path, tmp_path: Path) -> None:
    """For evaluation; compressed ones cannot be entered in the middle."""
    whole = long_text.read_text()
    (piece,) = read_texts(long_text, 128)
    assert whole.startswith(piece + " ") and 2 * MIB - 12 < len(piece) <= 2 * MIB
    assert read_texts(written(tmp_path, "a.txt.gz", gzip.compress(whole.encode(), 1)), 128, seed=3) == [piece]
    (piece,) = read_texts(long_text, 200_000)
    assert 4_000_000 - 12 < len(piece) <= 4_000_000
    assert read_texts(long_text, 600_000, seed=3) == [whole] == read_texts(long_text, 600_000)


@pytest.mark.parametrize("extra", [0, 1])
def test_two_mebibytes_are_read_whole(extra: int, tmp_path: Path) -> None:
    """As they have always been; one byte more is drawn from."""
    text = "word " * (2 * MIB // 5) + "." * (2 * MIB % 5 + extra)
    texts = read_texts(written(tmp_path, "a.txt", text), 10, seed=0)
    assert len(text) == 2 * MIB + extra and (texts == [text]) == (not extra)
    lines = [json.dumps({"text": f"{i:020}"}) + "\n" for i in range(2 * MIB // 33)]
    lines[0] = lines[0][:-1] + " " * (2 * MIB + extra - sum(map(len, lines))) + "\n"
    texts = read_texts(written(tmp_path, "a.jsonl", "".join(lines)), 10, seed=0)
    assert texts == [f"{i:020}" for i in range(len(lines))]  # all, as they have fewer characters than are wanted


def test_long_json_lines_are_drawn_from(tmp_path: Path) -> None:
    """The lines that begin in the drawn blocks, also those that end in the next one."""
    bodies = [f"{i:07} " + "word " * (37 + i % 50 * 8) for i in range(7000)]
    lines = [json.dumps({"id": i, "text": body}) + "\n" for i, body in enumerate(bodies)]
    lines[5] = json.dumps({"text": "long " * 60_000}) + "\n"  # through several blocks
    begins, at = [], 0
    for line in lines:
        begins.append(at)
        at += len(line)
    path = written(tmp_path, "a.txt", "\ufeff" + "".join(lines))
    for seed in range(2):
        wanted: set[int] = set()
        for block in draw(at + 3, seed, 10 * MIB):
            inside = [i for i, begin in enumerate(begins) if block == (begin + (3 if i else 0)) // BLOCK]
            wanted |= set(inside)
            if sum(len(json.loads(lines[i])["text"]) for i in wanted) >= 2 * MIB:
                break
        assert read_texts(path, 10, seed=seed) == [json.loads(lines[i])["text"] for i in sorted(wanted)]
    path.write_text("".join(line if i % 50 < 49 else "{nonsense}\n" for i, line in enumerate(lines)))
    with pytest.raises(InputError, match=r"The line at byte \d+ of .* is not valid JSON"):
        read_texts(path, 10, seed=0)


@pytest.mark.parametrize(
    "text",
    ["日本語のテキスト" * 200_000, "añ€😀b" * 400_000, "naïve\u3000 Straße\r\n" * 200_000],
    ids=["no space", "four sizes", "ends of lines"],
)
def test_borders_cut_no_characters(text: str, tmp_path: Path) -> None:
    pieces = read_texts(written(tmp_path, "a.txt", text), 10, seed=1)
    whole = text.replace("\r\n", "\n")
    assert len(pieces) > 1 and all(piece in whole for piece in pieces)
    if " " in text:
        assert {word for piece in pieces for word in piece.split()} == {"naïve", "Straße"}
    else:
        assert all(len(piece.encode()) > BLOCK - 8 for piece in pieces[:-1])


def test_no_fewer_windows_than_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text may have many characters for a token: more of it is read then, for evaluation and for calibration."""
    monkeypatch.setattr("slimllm.calibration.texts._FILE_CHARACTERS", 2 * BLOCK)
    words = Tokenizer(WordLevel({"word": 0, "other": 1}, unk_token="other"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    text = " ".join(["=" * 59] * 10_000)
    path = written(tmp_path, "a.txt", text)
    assert 5000 <= len(evaluation_tokens(tokenizer, str(path), 50, 100)) < 9000
    assert len(evaluation_tokens(tokenizer, str(path), 200, 100)) == 10_000
    assert len(evaluation_tokens(tokenizer, str(path), 50)) == 10_000  # all of it
    lines = written(tmp_path, "a.jsonl", "\n".join(json.dumps({"text": "=" * 600}) for _ in range(1000)))
    for source, tokens in ((path, 5000), (lines, 500)):
        texts = read_texts(source, tokens, seed=0, tokenizer=tokenizer)
        assert len(tokenizer("\n\n".join(texts))["input_ids"]) >= tokens
        assert sum(map(len, texts)) < 0.9 * len(text)


def test_a_json_list_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimllm.calibration.formats._LONGEST", MIB)
    content = json.dumps([{"text": "word " * 100}] * 3000)
    for name in ("a.json", "a.txt"):
        with pytest.raises(InputError, match=r"one JSON document of more than 1 MiB.*JSON lines"):
            read_texts(written(tmp_path, name, content), 10)
    with pytest.raises(InputError, match=r"Line 2 of .* is longer than 1 MiB"):
        read_texts(written(tmp_path, "a.jsonl", LINES[:17] + content), 10)


def test_messages_without_content_are_skipped(tokenizer: Any, tmp_path: Path, told: list[str]) -> None:
    """Such as those that call a tool."""
    rows = [{"messages": TALK}, {"messages": [*TALK, {"role": "assistant", "content": None}]}]
    path = written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert len(read_texts(path, 1, tokenizer=tokenizer)) == 1
    assert told == [f"1 of 2 documents have no text and are skipped ({path})."]


def test_a_template_keeps_a_bos_that_the_tokenizer_does_not_add(tokenizer: Any, tmp_path: Path) -> None:
    """Of SmolLM2 and its like the BOS is what every turn begins with."""
    path = written(tmp_path, "a.jsonl", json.dumps({"messages": TALK}))
    template = "{% for m in messages %}<s>[{{ m.role }}] {{ m.content }}{% endfor %}"
    without = Tokenizer(WordLevel({"<s>": 0, "other": 1}, unk_token="other"))
    plain = PreTrainedTokenizerFast(tokenizer_object=without, bos_token="<s>", chat_template=template)
    assert read_texts(path, 1, tokenizer=plain) == ["<s>[user] Hi.<s>[assistant] Hello."]
    tokenizer.chat_template = template
    assert read_texts(path, 1, tokenizer=tokenizer) == ["[user] Hi.<s>[assistant] Hello."]


def test_the_preset_paper_draws_from_all_of_a_long_file(tokenizer: Any, stories_path: Path, tmp_path: Path) -> None:
    """Its windows are what they were before long files were drawn by blocks."""
    text = " ".join(f"Word {number} of a long story." for number in range(90_000))
    path = written(tmp_path, "long.txt", text)
    config = PruneConfig(ratio=0.2, preset="paper", calibration=path, samples=4, seq_len=32, seed=3)
    wanted = draw_windows(tokenize(tokenizer, [text]), 4, 32, 3)
    model_config = open_checkpoint(stories_path).config
    assert torch.equal(calibration_windows(config, tokenizer, model_config).token_ids, wanted)
