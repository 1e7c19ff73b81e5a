"""Calibration and evaluation text: which source it is, and how much of it is taken."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from slimllm.calibration.files import check_regular, shown
from slimllm.calibration.formats import BLOCK_BYTES, TextFile, recognise
from slimllm.calibration.records import Records, fields_of
from slimllm.checkpoints.tokenizer import encode
from slimllm.errors import InputError

# A source is read until it has given this many characters for every token asked for, and a file at least the second number.
_CHARACTERS_PER_TOKEN = 20
_FILE_CHARACTERS = 2**21
# What is tokenized at once to see whether there are tokens enough, and by what factor more, since the count is rough.
_COUNTED_CHARACTERS = 2**16
_COUNTED_SURPLUS = 1.01
# The texts of the papers' perplexities, as LLM-Pruner and SlimLLM take them, by what they are called there; the second is
# only to be had as the hub has converted it, since its own form is code.
NAMED = {
    "wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1:test:text",
    "ptb": "ptb-text-only/ptb_text_only@refs/convert/parquet:penn_treebank:validation:sentence",
}


def bundled_text(name: str) -> str:
    """The text that comes with the package: `calibration` or `evaluation`, two separate parts of War and Peace."""
    return (resources.files("slimllm") / "calibration" / "data" / f"war_and_peace.{name}.txt").read_text(encoding="utf-8")


def read_texts(
    source: str | Path, tokens_wanted: float, *, seed: int | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[str]:
    """Read the documents of a file or a dataset, as many as are needed.

    A file is recognised by its content, not by its suffix: plain text (one document), or JSON lines or a JSON list of
    objects, each with a "text" or with "messages", which the model's chat template writes. It may be compressed with gzip
    or zstd. A .csv or .tsv file has a column "text". A dataset is `NAME:CONFIG:SPLIT:COLUMN`, of which all but the name may
    be left out (the split is then `train` and the column `text`, or else `messages`); `NAME@REVISION`, a folder of data
    files, or a name in `NAMED`.

    How much is taken of a file: let C be 20 * tokens_wanted, but at least 2 MiB (2**21).

    - A file of plain text or JSON lines of at most C bytes is read whole.
    - A longer one is cut into blocks of 64 KiB (2**16 bytes, the last is shorter) if `seed` is given. They are read in the
      order of `torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed))` until their documents have C
      characters, and the documents are returned in the order of the file. The documents of a block of JSON lines are those
      of the lines that begin in it. A block of plain text is one document, without the words that its borders cut.
    - Everything else is read from its beginning, until there are C characters of text: files without a `seed`, compressed
      files, JSON lists, tables. So are datasets, until there are 20 * tokens_wanted characters.

    If the tokenizer is given and makes fewer tokens of this than are wanted, C is doubled. Documents without a text, and
    those that are not valid Unicode, are skipped; how many are is logged.

    Args:
        source: The file, or the dataset.
        tokens_wanted: How many tokens the documents should give, if there are so many; infinity: all.
        seed: Seed of the places in a long file; None: from its beginning.
        tokenizer: The model's; "messages" need it.

    Raises:
        ValueError: (as InputError) the file or dataset does not exist, cannot be read, or holds no text.
    """
    name, characters = shown(source), tokens_wanted * _CHARACTERS_PER_TOKEN
    try:
        file = _file(source)
    except OSError as error:
        raise InputError(f"The text in {name} cannot be read: {error.strerror}.") from None
    if file:
        characters = max(characters, _FILE_CHARACTERS)
    while True:
        records = Records(name, tokenizer)
        if file is None:
            documents, more = _first(_dataset_entries(str(source)), "Row", records, characters)
        elif seed is not None and file.has_blocks and file.size > characters:
            documents, more = _drawn(file, records, characters, seed)
        elif file.kind == "text":
            documents, more = _beginning(file, characters)
        else:
            documents, more = _first(file.entries(), file.unit, records, characters)
        if not more or tokenizer is None or _has_tokens(documents, tokenizer, tokens_wanted):
            break
        characters *= 2
    records.finish()
    if not any(document.strip() for document in documents):
        raise InputError(f"{name} holds no text.")
    return documents


def _file(source: str | Path) -> TextFile | None:
    """The file, None if the source is a dataset."""
    path = Path(os.path.expanduser(source))
    if str(source) == "":
        raise InputError("The name of the text is empty; give a file or a dataset.")
    check_regular(path)
    if path.is_file():
        return recognise(path)
    if "://" in str(source):
        raise InputError(f"{shown(source)} is an address; download the text and give the file.")
    if path.suffix[1:].isalpha() and not path.is_dir():
        raise InputError(f"The text file {shown(source)} does not exist.")
    return None


def _drawn(file: TextFile, records: Records, characters: float, seed: int) -> tuple[list[str], bool]:
    """Documents from drawn blocks, and whether there are more."""
    count = -(-file.size // BLOCK_BYTES)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
    blocks: dict[int, list[str]] = {}
    length = 0
    for block in map(int, order):
        if file.kind == "text":
            documents = [file.block_text(block)]
        else:
            texts = (records.text(f"The line at byte {at}", record) for at, record in file.block_entries(block))
            documents = [text for text in texts if text is not None]
        blocks[block] = documents
        length += sum(map(len, documents))
        if length >= characters:
            break
    return [document for block in sorted(blocks) for document in blocks[block]], len(blocks) < count


def _beginning(file: TextFile, characters: float) -> tuple[list[str], bool]:
    """The plain text at the beginning up to the end of a word, and whether there is more."""
    text = file.text(None if characters == math.inf else int(characters) + 1)
    if len(text) <= characters:
        return [text], False
    word = re.search(r"\s\S*\Z", text[-1024:])
    return [text[: -len(word[0])] if word else text[:-1]], True


def _first(entries: Iterator[tuple[int, Any]], unit: str, records: Records, characters: float) -> tuple[list[str], bool]:
    """The first documents, and whether there are more."""
    documents: list[str] = []
    length = 0
    for number, record in entries:
        if length >= characters:
            return documents, True
        text = records.text(f"{unit} {number}", record)
        if text is not None:
            documents.append(text)
            length += len(text)
    return documents, False


def _has_tokens(documents: list[str], tokenizer: PreTrainedTokenizerBase, tokens_wanted: float) -> bool:
    """Whether a text surely has so many tokens; no more of it is tokenized than that takes."""
    text, tokens = "\n\n".join(documents), 0
    for begin in range(0, len(text), _COUNTED_CHARACTERS):
        piece = text[begin : begin + _COUNTED_CHARACTERS]
        tokens += len(encode(tokenizer, piece, special_tokens=False))
        if tokens >= tokens_wanted * _COUNTED_SURPLUS:
            return True
    return False


def _dataset_entries(name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a dataset, of each the column that is asked for as "text"."""
    folder = Path(name).is_dir()
    missing = f"{shown(name)} is a folder" if folder else f"There is no file {shown(name)}"
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{missing}; to read a dataset of that name, install the extra: pip install 'slimllm-engine[datasets]'."
        ) from None
    parts = [*(name if folder else NAMED.get(name, name)).split(":"), "", "", ""]
    path, _, revision = (parts[0], "", "") if Path(parts[0]).is_dir() else parts[0].partition("@")
    column = parts[3]
    try:
        stream = datasets.load_dataset(
            path, parts[1] or None, split=parts[2] or "train", streaming=True, revision=revision or None
        )
        for number, row in enumerate(stream, 1):
            if (column or "text") not in row and (column or "messages" not in row):
                raise InputError(
                    f'The dataset {shown(name)} has no column "{shown(column or "text")}"; name the one with the text: '
                    f"NAME:CONFIG:SPLIT:COLUMN (it has {fields_of(row)})."
                )
            yield number, {"messages" if column == "messages" else "text": row[column]} if column else row
    except InputError:
        raise
    except Exception as error:  # datasets raises many types for one fact: it cannot be had
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if Path(parts[0]).is_dir():
            raise InputError(f"The folder {shown(parts[0])} cannot be read as a dataset: {shown(reason)}.") from error
        raise InputError(
            f"There is no file {shown(name)}, and no dataset of that name can be had: {shown(reason)}."
        ) from error
