"""Options of a command, made from the fields of its settings: names, types, defaults and first docstring sentences."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

_Command = TypeVar("_Command", bound=Callable[..., None])
_ENTRY = re.compile(r"^(\w+(?:, \w+)*): ((?:.|\n(?= ))*)", re.MULTILINE)


def with_settings(kind: type, only: tuple[str, ...] = (), **names: str) -> Callable[[_Command], _Command]:
    """Return a decorator that gives a command with `**settings` an option for every field without a parameter of its own.

    Args:
        kind: A dataclass with its fields under "Attributes:" in its docstring.
        only: Names of the fields that get an option; empty: all.
        names: Names of options by field, where they differ from the field's name.
    """

    def decorate(command: _Command) -> _Command:
        own = list(inspect.signature(command, eval_str=True).parameters.values())
        taken, helps = {parameter.name for parameter in own}, help_of(kind)
        made = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=Annotated[
                    _simple(str(field.type)),
                    typer.Option(*[names[field.name]] if field.name in names else [], help=helps.get(field.name, "")),
                ],
            )
            for field in dataclasses.fields(kind)
            if field.name not in taken and (not only or field.name in only)
        ]
        parameters = []
        for parameter in own:
            rest = parameter.kind is inspect.Parameter.VAR_KEYWORD
            parameters += made if rest else [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def help_of(kind: type) -> dict[str, str]:
    """Return the first sentence about every field, without backticks."""
    text = inspect.cleandoc(kind.__doc__ or "")  # from Python 3.13 on, docstrings have no indentation
    if "Attributes:" in text:
        text = textwrap.dedent(text.partition("Attributes:\n")[2].partition("\n\n")[0])
    found = {}
    for names, about in _ENTRY.findall(text):
        sentence = re.split(r"(?<=\.)\s", " ".join(about.split()), maxsplit=1)[0]
        found.update(dict.fromkeys(names.split(", "), sentence.replace("`", "")))
    return found


def _simple(hint: str) -> Any:
    """Return the type of an option from an annotation as it is written: a switch, a number, texts, or else a text."""
    if "Sequence[" in hint:
        return list[str] | None
    kinds = hint.split(" | ")
    simple = next((one for one in (bool, int, float, str) if one.__name__ in kinds), str)
    return simple | None if "None" in kinds or hint == "Any" else simple
