"""Conversion of a Hugging Face tokenizer to the vocabulary of a GGUF file."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf

from slimllm.checkpoints.foreign_json import EVERY, check_shape, read_object
from slimllm.errors import InputError

_log = logging.getLogger("slimllm")
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's names of pre-tokenizers, by the type and the relevant option of every step.
_PRE_TOKENIZERS = {
    (("Split", _LLAMA3), ("ByteLevel", False)): "llama-bpe",
    (("Split", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")), ("ByteLevel", False)): "qwen2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("ByteLevel", True),): "gpt-2",
}


_BPE = {
    "model": {"vocab": {EVERY: int}, "merges": [(str, list)]},
    "added_tokens?": [{"id": int, "content": str}],
    "normalizer?": dict,
    "pre_tokenizer?": dict,
}


def add_vocabulary(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Add tokens, merges, special tokens and chat template of the tokenizer in a folder.

    Args:
        writer: The file's writer.
        folder: The folder with tokenizer.json.
        vocab_size: Rows of the embedding; ids that the tokenizer does not use are filled with unused tokens.

    Raises:
        ValueError: (as InputError) the tokenizer is missing or unsupported, or has more tokens than the embedding.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            "The model has no tokenizer.json, from which the file's vocabulary is made; save a fast tokenizer there."
        )
    tokenizer = _read_bpe(path)
    model = tokenizer["model"]
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    added = {entry["id"]: entry for entry in tokenizer.get("added_tokens", [])}
    if beyond := [entry["content"] for index, entry in added.items() if index >= vocab_size]:  # of other kinds of input
        _log.warning("The embedding has no rows for these added tokens, which are left out: %s.", ", ".join(beyond))
        added = {index: entry for index, entry in added.items() if index < vocab_size}
    texts = {index: text for text, index in model["vocab"].items()} | {i: entry["content"] for i, entry in added.items()}
    texts = {index: text for index, text in texts.items() if text not in beyond}
    if max(texts) >= vocab_size:
        raise InputError(f"The tokenizer has token {max(texts)}, but the model's embedding has only {vocab_size} rows.")
    tokens = [texts.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    types = [_token_type(index, texts, added, bool(model.get("byte_fallback"))) for index in range(vocab_size)]
    if model.get("byte_fallback"):  # llama.cpp looks for added tokens in the text itself, in which spaces are spaces
        for index in (index for index, entry in added.items() if not entry.get("special")):
            tokens[index] = tokens[index].replace("▁", " ")
    if model.get("byte_fallback"):  # SentencePiece: llama.cpp merges the pair with the highest score first
        scores = {"".join(merge): -float(rank + 1) for rank, merge in reversed(list(enumerate(merges)))}
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        # A token that no merge produces must never be merged; the scores of single characters do not matter.
        writer.add_token_scores([scores.get(token, 0.0 if len(token) == 1 else -1e9) for token in tokens])
        writer.add_add_space_prefix("Prepend" in json.dumps(tokenizer.get("normalizer")) or _metaspace_prefix(tokenizer))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    with _silent_about_pairs():
        special = gguf.SpecialVocab(folder, load_merges=not model.get("byte_fallback"), n_vocab=vocab_size)
    special.add_to_gguf(writer, quiet=True)


def _read_bpe(path: Path) -> dict[str, Any]:
    tokenizer = read_object(path)
    try:
        check_shape(tokenizer, {"model": {"type": str}}, "")
        if (kind := tokenizer["model"]["type"]) == "BPE":
            check_shape(tokenizer, _BPE, "")
    except InputError as error:
        raise InputError(f"{path} is not a fast tokenizer: {error}") from None
    if kind != "BPE":
        raise InputError(f"The tokenizer is of type {kind}; only BPE tokenizers can be written to GGUF.")
    return tokenizer


@contextmanager
def _silent_about_pairs() -> Iterator[None]:
    """Suppress gguf's warnings about how a tokenizer joins two texts, which a causal language model never needs."""

    def matters(record: logging.LogRecord) -> bool:
        return "TemplateProcessing<pair>" not in record.getMessage()

    logger = logging.getLogger("gguf.vocab")
    logger.addFilter(matters)
    try:
        yield
    finally:
        logger.removeFilter(matters)


def _token_type(index: int, texts: dict[int, str], added: dict[int, dict[str, Any]], bytes_too: bool) -> gguf.TokenType:
    if index not in texts:
        return gguf.TokenType.UNUSED
    if index in added:
        return gguf.TokenType.CONTROL if added[index].get("special") else gguf.TokenType.USER_DEFINED
    text = texts[index]
    is_byte = bytes_too and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL


def _metaspace_prefix(tokenizer: dict[str, Any]) -> bool:
    pre = tokenizer.get("pre_tokenizer") or {}
    return pre.get("type") == "Metaspace" and pre.get("prepend_scheme", "always") != "never"


def _pre_tokenizer(tokenizer: dict[str, Any]) -> str:
    pre = tokenizer.get("pre_tokenizer") or {}
    steps = []
    for step in pre.get("pretokenizers", [pre]):
        kind = str(step.get("type"))
        if step.get("add_prefix_space") or step.get("invert") or step.get("behavior", "Isolated") != "Isolated":
            kind += " of another kind"
        matters = {"Split": step.get("pattern", {}).get("Regex"), "Digits": step.get("individual_digits")}
        steps.append((kind, matters.get(kind, step.get("use_regex", True))))
    name = _PRE_TOKENIZERS.get(tuple(steps))
    if name is None:
        raise InputError(
            f"This package cannot map the tokenizer's pre-tokenizer ({', '.join(str(kind) for kind, _ in steps)}) to one "
            "of llama.cpp's; convert the padded export with llama.cpp's own convert_hf_to_gguf.py."
        )
    return name
