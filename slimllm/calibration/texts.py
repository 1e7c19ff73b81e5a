"""Sources of calibration and evaluation text, and how much of each is read."""

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

# Characters read for every token asked for, and the least number of characters read from a file.
_CHARACTERS_PER_TOKEN = 20
_FILE_CHARACTERS = 2**21
# Characters tokenized at once to count tokens, and the factor by which the count, which is rough, must exceed the need.
_COUNTED_CHARACTERS = 2**16
_COUNTED_SURPLUS = 1.01
# Texts of the papers' perplexities, as LLM-Pruner and SlimLLM use them, by the names used there. PTB is read from the hub's
# converted copy, since its own repository holds a loading script.
NAMED = {
    "wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1:test:text",
    "ptb": "ptb-text-only/ptb_text_only@refs/convert/parquet:penn_treebank:validation:sentence",
}


# Of the bundled calibration text: two fifths of a novel, two fifths of encyclopaedias, a tenth each of a play and of code.
_NOVEL_CHARACTERS = 300_000
_OTHERS = ("encyclopaedia", "play", "code")


def bundled_text(name: str) -> str:
    """Return a text that comes with the package.

    Args:
        name: `calibration`, text of several kinds; `novel`, a part of War and Peace, with which the preset paper
            calibrates; or `evaluation`, another part of it.
    """
    if name == "calibration":
        novel = _data("war_and_peace.calibration")[:_NOVEL_CHARACTERS].rpartition("\n\n")[0]
        return "\n\n".join([novel, *map(_data, _OTHERS)])
    return _data("war_and_peace.calibration" if name == "novel" else f"war_and_peace.{name}")


def _data(name: str) -> str:
    return (resources.files("slimllm") / "calibration" / "data" / f"{name}.txt").read_text(encoding="utf-8")


def read_texts(
    source: str | Path, tokens_wanted: float, *, seed: int | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[str]:
    """Read as many documents of a file or a dataset as are needed.

    A file is recognised by its content, not by its suffix. It is plain text (one document), or JSON lines or a JSON list of
    objects, each with a "text" or with "messages", which the model's chat template renders. It may be compressed with gzip
    or zstd. A .csv or .tsv file has a column "text".

    A dataset is `NAME:CONFIG:SPLIT:COLUMN`. All parts but the name are optional: the default split is `train`, and the
    default column `text`, or else `messages`. `NAME@REVISION`, a folder of data files, and a name in `NAMED` also work.

    Let C be 20 * tokens_wanted, but at least 2 MiB (2**21). This much of a file is read:

    - A file of plain text or JSON lines of at most C bytes is read whole.
    - A longer one is cut into blocks of 64 KiB (2**16 bytes; the last may be shorter) if `seed` is given. Blocks are read
      in the order of `torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed))` until their documents have
      C characters, and the documents are returned in the order of the file. The documents of a block of JSON lines are
      those of the lines that begin in it. A block of plain text is one document, without the words that its borders cut.
    - Everything else (files without a `seed`, compressed files, JSON lists, tables) is read from its beginning until there
      are C characters of text. A dataset is read until there are 20 * tokens_wanted characters.

    If a tokenizer is given and yields fewer tokens than are wanted, C is doubled. Documents without a text, and those that
    are not valid Unicode, are skipped; their number is logged.

    Args:
        source: The file, or the dataset.
        tokens_wanted: Number of tokens that the documents should give, if there are that many; infinity: all.
        seed: Seed of the blocks drawn from a long file; None: read from its beginning.
        tokenizer: The model's tokenizer; required for "messages".

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
    """Return the file, or None if the source is a dataset."""
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
    """Return documents from randomly drawn blocks, and whether there are more."""
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
    """Return the plain text at the beginning, cut at the end of a word, and whether there is more."""
    text = file.text(None if characters == math.inf else int(characters) + 1)
    if len(text) <= characters:
        return [text], False
    word = re.search(r"\s\S*\Z", text[-1024:])
    return [text[: -len(word[0])] if word else text[:-1]], True


def _first(entries: Iterator[tuple[int, Any]], unit: str, records: Records, characters: float) -> tuple[list[str], bool]:
    """Return the first documents, and whether there are more."""
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
    """Return whether a text certainly has this many tokens; tokenize no more of it than necessary."""
    text, tokens = "\n\n".join(documents), 0
    for begin in range(0, len(text), _COUNTED_CHARACTERS):
        piece = text[begin : begin + _COUNTED_CHARACTERS]
        tokens += len(encode(tokenizer, piece, special_tokens=False))
        if tokens >= tokens_wanted * _COUNTED_SURPLUS:
            return True
    return False


def _dataset_entries(name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the numbered rows of a dataset; a column that was named stands in the field "text", or "messages"."""
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
    except Exception as error:  # datasets raises many types when a dataset cannot be loaded
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if Path(parts[0]).is_dir():
            raise InputError(f"The folder {shown(parts[0])} cannot be read as a dataset: {shown(reason)}.") from error
        raise InputError(
            f"There is no file {shown(name)}, and no dataset of that name can be loaded: {shown(reason)}."
        ) from error
