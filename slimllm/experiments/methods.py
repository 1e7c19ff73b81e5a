"""Methods by the names that tables have: rows of settings for comparisons and sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


# What a row may set; all else is common to a comparison.
_SETTINGS = ("preset", "criterion", "allocation", "recovery", "token_weights", "round_to")


def rows_of(methods: Sequence[str] | Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The settings of methods, by name.

    Args:
        methods: Names, see `row_of`; or, by a name of the caller's, some of the settings `preset`, `criterion`,
            `allocation`, `recovery`, `token_weights` and `round_to` of `PruneConfig`.

    Raises:
        ValueError: (as InputError) a name is unknown, or cannot be that of a folder; or a row sets something else.
    """
    if not isinstance(methods, Mapping):
        return {_spaced(name): row_of(name) for name in methods}
    for name, row in methods.items():
        if name in ("", ".", "..", "dense") or "/" in name:
            raise InputError(f"{name!r} cannot be the name of a method in a table; give another one.")
        if other := sorted(set(row) - set(_SETTINGS)):
            raise InputError(f"The method {name!r} sets {other[0]}; a method may set {', '.join(_SETTINGS)}.")
    return {name: dict(row) for name, row in methods.items()}


def row_of(name: str) -> dict[str, Any]:
    """The settings of a method: a name in `METHODS`, a preset, or one of yours; or such joined by `+`, as `mine + lstsq`.

    The first part may be a whole method, and those after it take the place of its criterion, allocation or recovery. What
    is not named is the default preset's.

    Raises:
        ValueError: (as InputError) the name is unknown.
    """
    if (known := _spaced(name)) in METHODS:
        return dict(METHODS[known])
    parts, row, taken = known.split(" + "), {}, set()
    if parts[0] in METHODS or parts[0] in PRESETS:
        row = dict(METHODS.get(parts[0], {"preset": parts[0]}))
        taken = {"criterion"} & set(row)
        parts = parts[1:]
    for part in parts:
        kind = next((kind for kind, registry in KINDS.items() if kind not in taken and part in registry.all()), None)
        if kind is None:
            rows = ", ".join(f'"{row}"' if "," in row else row for row in dict.fromkeys([*METHODS, *PRESETS]))
            raise InputError(
                f"{name!r} is not a method; give one of {rows}, or join a criterion, an allocation and a recovery with +, "
                "such as mine+lstsq."
            )
        row[kind] = part
        taken.add(kind)
    return row


def _spaced(name: str) -> str:
    """A joined name as tables have it."""
    return " + ".join(part.strip() for part in name.split("+"))


def config_of(config: PruneConfig, row: Mapping[str, Any], ratio: float) -> PruneConfig:
    """Settings that several methods have in common, with those of one of them."""
    return config.with_preset(**{"preset": "default", **row}, ratio=ratio)


def identity_of(config: PruneConfig) -> dict[str, Any]:
    """Which methods settings have: their code, and their options."""
    return {kind: [getattr(config, kind).code(), getattr(config, kind).describe()] for kind in KINDS}
