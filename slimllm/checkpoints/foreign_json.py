"""Reading of JSON files that others have written or changed; no other module reads such files.

Invalid JSON, excessive nesting, an oversized file or an unexpected shape results in an error of one sentence.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from slimllm.errors import InputError

_MOST_LEVELS = 100
MOST_BYTES = 256 * 2**20  # the largest tokenizer.json known has 33 MB
MOST_OF_SETTINGS = 16 * 2**20

# The shape of a value: a type or a tuple of types; a dict of its entries' shapes, of which those with a ? may be missing or
# null; a list with the shape of all its items; or a dict with the one entry EVERY, for the values of all names. float also
# accepts whole numbers, int only whole numbers of at least 0, POSITIVE only finite numbers above 0.
Shape = Any
EVERY, POSITIVE = "*", "positive"


def read_json(path: Path, most: int = MOST_BYTES) -> Any:
    """Read a JSON file of at most `most` bytes, with or without a byte order mark.

    Raises:
        ValueError: (as InputError) it cannot be read, is too large, is not JSON in UTF-8, or is nested too deeply.
    """
    try:
        if not path.is_file():
            raise InputError(f"{path} is not a file.")
        if (size := path.stat().st_size) > most:
            raise InputError(f"{path} has {size / 1e6:,.0f} MB, which is too large for such a file.")
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if _is_deep(content):
            raise RecursionError
        return content
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    except RecursionError:
        raise InputError(f"{path} cannot be read: it is nested too deeply.") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not valid JSON: {str(error).rstrip('.')}.") from None


def _is_deep(content: Any) -> bool:
    """Return whether a value is nested more deeply than any such file, so that recursive functions could fail."""
    level = [content]
    for _ in range(_MOST_LEVELS):
        level = [value for value in level if isinstance(value, dict | list)]
        if not level:
            return False
        level = [inner for value in level for inner in (value.values() if isinstance(value, dict) else value)]
    return True


def read_object(path: Path, most: int = MOST_BYTES) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Raises:
        ValueError: (as InputError) as `read_json`, or it contains something else.
    """
    content = read_json(path, most)
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object.")
    return content


def find_object(path: Path, most: int = MOST_BYTES) -> dict[str, Any]:
    """Read a JSON object; return an empty one if the file is missing or unreadable. Code that needs it complains itself."""
    try:
        return read_object(path, most) if path.is_file() else {}
    except InputError:
        return {}


def check_shape(value: Any, shape: Shape, where: str) -> None:
    """Raise ValueError (as InputError) if a value has another shape; `where` is its name in the message.

    Optional entries that are null are removed, unless null is among their types.
    """
    if isinstance(shape, dict):
        _check_kind(value, dict, where)
        if EVERY in shape:
            shape = dict.fromkeys(value, shape[EVERY])
        for name, inner in shape.items():
            optional = name.endswith("?")
            name = name.removesuffix("?")
            if value.get(name) is not None or (name in value and type(None) in (inner if isinstance(inner, tuple) else ())):
                check_shape(value[name], inner, f"{where}.{name}" if where else name)
            elif optional:
                value.pop(name, None)
            else:
                raise InputError(f"{where}.{name} is missing." if where else f"{name} is missing.")
    elif isinstance(shape, list):
        _check_kind(value, list, where)
        for index, item in enumerate(value):
            check_shape(item, shape[0], f"{where}[{index}]")
    else:
        _check_kind(value, shape, where)


def _check_kind(value: Any, kind: Any, where: str) -> None:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not any(_is(value, one) for one in kinds):
        wanted = " or ".join(_KINDS[one] for one in kinds)
        raise InputError(f"{where} is {str(value)[:40]!r}, but should be {wanted}.")


_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "true or false",
    int: "a whole number of at least 0",
    type(None): "null",
    float: "a finite number",
    POSITIVE: "a finite number above 0",
}


def _is(value: Any, kind: Any) -> bool:
    if kind in (dict, list, str, bool, type(None)):
        return isinstance(value, kind)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        return False
    if kind is int and value >= 2**63:  # beyond the integers of any library
        return False
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an int may be larger than any float
        return False
    return finite and bool(kind is float or value > 0 or (kind is int and value == 0))
