"""Checks of settings, and amounts of memory, dtypes and devices by name."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from slimllm.errors import InputError

if TYPE_CHECKING:  # where it is needed it is imported: wrong settings are refused before that
    import torch

GIB = 2**30
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": GIB, "TIB": 2**40}
DTYPES = ("float32", "float16", "bfloat16")


def parse_bytes(name: str, value: str | None) -> float:
    """Parse an amount of memory such as `8GiB`, `8G` (the same) or `24 GB` into bytes; None gives infinity.

    Raises:
        ValueError: (as InputError) the value is not an amount of memory, or is 0.
    """
    if value is None:
        return math.inf
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT](?:i?B)?)\s*", str(value), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise InputError(f"{name} is an amount of memory with its unit, such as 16GiB, got {value!r}.")
    unit = match[2].upper()
    return float(match[1]) * _UNITS[unit if len(unit) > 1 else f"{unit}IB"]


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype of one of the names in `DTYPES`."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def parse_device(name: str | None) -> torch.device:
    """Return a device by name; None: a GPU if there is one, otherwise the CPU.

    Raises:
        ValueError: (as InputError) there is no device of that name.
    """
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device must be cpu, cuda or cuda:N, got {name!r}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name} was asked for, but torch sees {torch.cuda.device_count()} GPUs.")
    return device


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise InputError if the value of a setting is not one of the choices."""
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")


def check_number(name: str, value: Any, kind: type | tuple[type, ...], least: float | None = None) -> None:
    """Raise TypeError if the value of a setting is not of a kind, InputError if it is not finite or less than `least`."""
    fits: bool = isinstance(value, kind) and not isinstance(value, bool)
    if not fits:
        wanted = "an integer" if kind is int else "a number"
        raise TypeError(f"{name} must be {wanted}, got {value!r}.")
    number: float = value
    if not math.isfinite(number) or (least is not None and number < least):
        bound = "a finite number" if least is None or not math.isfinite(number) else f"at least {least}"
        raise InputError(f"{name} must be {bound}, got {value}.")
