"""Calibration and evaluation text: the documents of a file or a dataset."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

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
