"""Methods by the names that tables have: rows of settings for comparisons and sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimllm.config import METHODS as KINDS
from slimllm.config import PRESETS, PruneConfig
from slimllm.errors import InputError

# The settings of each method, by its name in a table. Those that measure most come first, so that others can use it.
METHODS: dict[str, dict[str, Any]] = {
    "best": {"preset": "best"},
    "flap": {"criterion": "flap", "allocation": "flap", "recovery": "bias"},
    "flap, uniform": {"criterion": "flap", "allocation": "uniform", "recovery": "bias"},
    "slimllm": {"preset": "default"},
    "slimllm + lstsq": {"recovery": "lstsq"},
    "obs + lstsq": {"criterion": "obs", "recovery": "lstsq"},
    "wanda-sp": {"criterion": "wanda-sp", "allocation": "uniform", "recovery": "none"},
    "wanda-sp + lstsq": {"criterion": "wanda-sp", "allocation": "uniform", "recovery": "lstsq"},
    "magnitude": {"criterion": "magnitude", "allocation": "uniform", "recovery": "none"},
    "random": {"criterion": "random", "allocation": "uniform", "recovery": "none"},
}


def rows_of(methods: Sequence[str] | Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The settings of methods by name, in the order in which they share most work.

    Args:
        methods: Names, see `row_of`; or settings of `PruneConfig` by a name of the caller's.

    Raises:
        ValueError: (as InputError) a name is unknown.
    """
    if isinstance(methods, Mapping):
        for name in methods:
            if not name or Path(name).name != name:
                raise InputError(f"The name of a method must be one word of a path, got {name!r}.")
        return {name: dict(row) for name, row in methods.items()}
    names = dict.fromkeys(methods)
    order = [*(name for name in METHODS if name in names), *(name for name in names if name not in METHODS)]
    return {name: row_of(name) for name in order}


def row_of(name: str) -> dict[str, Any]:
    """The settings of a method: a name in `METHODS`, a preset, or registered methods joined by `+`, as `mine + lstsq`.

    What is not named (criterion, allocation or recovery) is the default preset's.

    Raises:
        ValueError: (as InputError) the name is unknown.
    """
    parts = [part.strip() for part in name.split("+")]
    if (known := " + ".join(parts)) in METHODS:
        return dict(METHODS[known])
    if name in PRESETS:
        return {"preset": name}
    row: dict[str, Any] = {}
    for part in parts:
        kind = next((kind for kind, registry in KINDS.items() if kind not in row and part in registry.all()), None)
        if kind is None:
            rows = ", ".join(f'"{row}"' if "," in row else row for row in dict.fromkeys([*METHODS, *PRESETS]))
            raise InputError(
                f"{name!r} is not a method; give one of {rows}, or join a criterion, an allocation and a recovery with +, "
                "such as mine+lstsq."
            )
        row[kind] = part
    return row


def config_of(config: PruneConfig, row: Mapping[str, Any], ratio: float) -> PruneConfig:
    """Settings that several methods have in common, with those of one of them."""
    return config.with_preset(**{"preset": "default", **row}, ratio=ratio)
