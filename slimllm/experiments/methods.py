"""Settings of methods by the names used in tables, for comparisons and sweeps."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from slimllm.config import METHODS as KINDS
from slimllm.config import PruneConfig
from slimllm.errors import InputError
from slimllm.presets import DEFAULT, PRESETS

_PLAIN = {"preset": "slimllm"}  # the paper's parts where a row names no other, and all tokens count alike
# Settings of each method, by its name in a table. Each comes after one whose dense pass serves it, if there is one.
METHODS: dict[str, dict[str, Any]] = {
    "best": {"preset": "best"},
    "flap": {**_PLAIN, "criterion": "flap", "allocation": "flap", "recovery": "bias"},
    "flap, uniform": {**_PLAIN, "criterion": "flap", "allocation": "uniform", "recovery": "bias"},
    "slimllm": _PLAIN,
    "slimllm + lstsq": {**_PLAIN, "recovery": "lstsq"},
    "slimllm + obs + lstsq": {**_PLAIN, "criterion": "obs", "recovery": "lstsq"},
    "obs + lstsq, uniform": {**_PLAIN, "criterion": "obs", "allocation": "uniform", "recovery": "lstsq"},
    "wanda-sp": {**_PLAIN, "criterion": "wanda-sp", "allocation": "uniform", "recovery": "none"},
    "wanda-sp + lstsq": {**_PLAIN, "criterion": "wanda-sp", "allocation": "uniform", "recovery": "lstsq"},
    "magnitude": {**_PLAIN, "criterion": "magnitude", "allocation": "uniform", "recovery": "none"},
    "random": {**_PLAIN, "criterion": "random", "allocation": "uniform", "recovery": "none"},
}


# Settings that a row may have; all others are common to a comparison.
_SETTINGS = ("preset", "criterion", "allocation", "recovery", "token_weights", "round_to", "bias")


def rows_of(methods: Sequence[str] | Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the settings of methods, by name.

    Args:
        methods: Names, see `row_of`; or a mapping from names of the caller's choice to any of the settings `preset`,
            `criterion`, `allocation`, `recovery`, `token_weights`, `round_to` and `bias` of `PruneConfig`.

    Raises:
        ValueError: (as InputError) a name is unknown, or cannot name a folder; or a row has another setting.
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
    """Return the settings of a method by its name.

    The name is one in `METHODS`, a preset, or a registered criterion, allocation or recovery; or several joined by `+`,
    such as `mine + affine`. The first part may be a whole method, of which later ones replace a part.
    Settings that neither it nor a row of `METHODS` names are those of the default preset.

    Raises:
        ValueError: (as InputError) the name is unknown, or its parts do not go together.
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
            registered = [method for registry in KINDS.values() for method in registry.all()]
            every = list(dict.fromkeys([*METHODS, *PRESETS, *registered]))
            close = difflib.get_close_matches(name.lower().replace("_", "-"), every, 1)
            meant = f" Did you mean {close[0]}?" if close else ""
            rows = ", ".join(f'"{row}"' if "," in row else row for row in every)
            raise InputError(
                f"{name!r} is not a method.{meant} Give one of {rows}; or join a criterion, an allocation and a recovery "
                "with +, such as mine+affine."
            )
        row[kind] = part
        taken.add(kind)
    try:
        PruneConfig(0.5, **{"preset": DEFAULT, **row})
    except InputError as error:
        raise InputError(f"The method {name!r} cannot run: {error}") from None
    return row


def _spaced(name: str) -> str:
    """Return a joined name as it appears in tables, with a space on each side of `+`."""
    return " + ".join(part.strip() for part in name.split("+"))


def config_of(config: PruneConfig, row: Mapping[str, Any], ratio: float) -> PruneConfig:
    """Combine the common settings with those of one method and a ratio."""
    return config.with_preset(**{"preset": DEFAULT, **row}, ratio=ratio)


def identity_of(config: PruneConfig) -> dict[str, Any]:
    """Return what identifies the methods in the settings: their code and their options."""
    return {kind: [getattr(config, kind).code(), getattr(config, kind).describe()] for kind in KINDS}
