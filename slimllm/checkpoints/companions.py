"""Files that are copied with a model's weights: all files of its tokenizer, whatever their names, and its licence.

Most have known names. Others are named by tokenizer_config.json, by the tokenizer's class in transformers, or, for code, by
`auto_map`. Code is copied unchanged and never run.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from slimllm.checkpoints.foreign_json import MOST_BYTES, MOST_OF_SETTINGS, find_object
from slimllm.errors import InputError

_log = logging.getLogger("slimllm")

# Patterns of file names, for folders and for downloads.
PATTERNS = (
    "generation_config.json",
    "*processor_config.json",
    "tokenizer*",
    "special_tokens_map*.json",
    "added_tokens*.json",
    "tekken*.json",
    "vocab.*",
    "vocab*.json",
    "vocab*.txt",
    "*vocab.json",
    "*vocab.txt",
    "*.vocab",
    "merges*.txt",
    "*.model",
    "*.tiktoken",
    "*.bpe",
    "*.spm",
    "bpe.codes",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)

# Weights, and files that every result writes itself: never copied, even if named.
_NEVER = re.compile(
    r"(.*\.(safetensors|bin|pth?|ckpt|gguf|h5|msgpack|onnx|npz|pkl|pickle)|.*\.index\.json|config\.json|readme\.md"
    r"|report\.(json|html)|finetune\.json|(modeling|configuration)_.*\.py|slim_layers\.py)",
    re.IGNORECASE,
)
_PLAIN = re.compile(r"\w[\w.+ -]*")  # a file's own name: not a path, not a pattern, not hidden
_LEGAL = ("LICENSE", "NOTICE", "USE_POLICY")
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # a checksum, which cannot be guessed
_NOTHING, _UNREADABLE = "is a link to nothing", "cannot be read"
_DEVICE, _LARGE = "is a device or a pipe, not a file", "is larger than any such file"
_MOST_CODE = 4 * 2**20  # bytes of a Python file
_RELATIVE_IMPORT = re.compile(r"^[ \t]*(?:from|import)[ \t]+\.(\w+)", re.MULTILINE)


def companions(folder: Path) -> list[Path]:
    """Return the files in a model's folder that are copied with the weights, relative to it and sorted."""
    return [file for file, fault in _wanted(folder) if fault is None]


def left_out(folder: Path) -> list[str]:
    """Return sentences about files that should be copied but are not: licences, and broken links.

    A link out of the folder is followed only into the hub's cache, where every file is such a link. Elsewhere it might have
    been planted to get a private file of the user published.

    Raises:
        ValueError: (as InputError) a file of the tokenizer cannot be copied, which would make the result unusable.
    """
    said = []
    for file, fault in _wanted(folder):
        if fault and fault != _NOTHING and not file.name.startswith(_LEGAL):
            raise InputError(
                f"{folder / file} {fault}, so it cannot be copied to the result; put a copy of the file in its place."
            )
        if fault:
            said.append(f"{folder / file} {fault}, so it is not copied.")
    return said


def copy_companions(source: Path, target: Path) -> None:
    """Copy the files that accompany the weights from one folder to another, except files deleted in the meantime."""
    for file in companions(source):
        (target / file).parent.mkdir(exist_ok=True)
        try:
            shutil.copyfile(source / file, target / file)
        except FileNotFoundError:
            _log.warning("%s was deleted in the meantime, so it is not copied.", source / file)


def check_regular_files(folder: Path) -> None:
    """Raise ValueError (as InputError) if reading a file of the tokenizer might never end."""
    for file, fault in _wanted(folder):
        if fault in (_DEVICE, _LARGE) and not file.name.startswith(_LEGAL):  # no library opens licences
            raise InputError(f"{folder / file} {fault}; put the tokenizer's own file in its place.")


def _wanted(folder: Path) -> list[tuple[Path, str | None]]:
    """Return all files that should be copied, each with the reason why it cannot be; None: it can."""
    named = named_files(folder)
    found = []
    for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        name = path.relative_to(folder).as_posix()
        wanted = name in named or (not name.endswith(".py") and _matches(name))
        if wanted and not _NEVER.fullmatch(name) and not path.is_dir():
            found.append((path.relative_to(folder), _fault(path, folder)))
    return found


def _fault(path: Path, folder: Path) -> str | None:
    try:
        if not path.exists():
            return _NOTHING
        if not path.is_file():
            return _DEVICE
        if not _is_own(path, folder):
            return "is a link that leads out of its folder"
        if path.stat().st_size > MOST_BYTES:
            return _LARGE
        return None if os.access(path, os.R_OK) else _UNREADABLE
    except OSError:
        return _UNREADABLE


def files_to_fetch(folder: Path) -> set[str]:
    """Return the files that a downloaded tokenizer's settings name, but that no pattern has fetched into its folder."""
    names = {name for name in named_files(folder) if "." in name}
    return {name for name in names if not _matches(name) and not (folder / name).exists()}


def named_files(folder: Path) -> set[str]:
    """Return the file names that tokenizer_config.json, the tokenizer's class and its code give, existing or not."""
    settings = find_object(folder / "tokenizer_config.json", MOST_OF_SETTINGS)
    config = find_object(folder / "config.json", MOST_OF_SETTINGS)
    found = set(_strings(settings.values()))
    found |= set(_vocabulary_files(settings.get("tokenizer_class") or config.get("tokenizer_class")))
    found = {name for name in found if not name.endswith(".py")}
    return {name for name in found | _code(folder, settings) if _PLAIN.fullmatch(name) and not _NEVER.fullmatch(name)}


def _matches(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in PATTERNS if pattern.count("/") == name.count("/"))


def _is_own(path: Path, folder: Path) -> bool:
    target = path.resolve()
    in_cache = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    return (in_cache and _BLOB.fullmatch(target.name) is not None) or target.is_relative_to(folder.resolve())


def _strings(values: Iterable[Any]) -> list[str]:
    """Return the strings among the values, and in lists among them."""
    every = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return [item for item in every if isinstance(item, str)]


def _vocabulary_files(class_name: Any) -> list[str]:
    """Return the file names that a class of transformers uses."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    if not isinstance(class_name, str):
        return []
    try:
        names = getattr(tokenizer_class_from_name(class_name), "vocab_files_names", None)
    except ImportError:  # the class needs a library that is not installed
        return []
    return _strings(names.values()) if isinstance(names, dict) else []


def _code(folder: Path, settings: dict[str, Any]) -> set[str]:
    """Return the Python files of a custom tokenizer, and the files in the same folder that they import."""
    auto_map = settings.get("auto_map")
    classes = _strings([auto_map.get("AutoTokenizer")]) if isinstance(auto_map, dict) else _strings([auto_map])
    waiting = [f"{name.split('.')[0]}.py" for name in classes if "--" not in name]  # with --, it is in another repository
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        path = folder / name
        if name in found or not _PLAIN.fullmatch(name) or _NEVER.fullmatch(name):
            continue
        found.add(name)
        if _fault(path, folder) is None and path.stat().st_size <= _MOST_CODE:
            text = path.read_text(encoding="utf-8", errors="replace")
            waiting += [f"{module}.py" for module in _RELATIVE_IMPORT.findall(text)]
    return found
