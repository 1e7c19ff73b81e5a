"""Methods on the command line: plug-ins, and the options of methods, such as `--layer-importance.alpha 5`."""

from __future__ import annotations

import difflib
import re
from typing import Any, get_args, get_type_hints

import typer

from slimllm.config import METHODS, PRESETS
from slimllm.errors import InputError
from slimllm.plugins import Method, import_plugin

# Of a command that takes them; they arrive in `typer.Context.args`.
WITH_METHOD_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}
_OPTION = re.compile(r"--([a-z0-9-]+)\.([a-z0-9-]+)(?:=(.*))?", re.DOTALL)


def chosen_methods(
    context: typer.Context, plugins: list[str] | None, preset: str, **chosen: str | None
) -> dict[str, Method | str | None]:
    """The methods that were asked for, with their options.

    Args:
        context: Of the command; its unknown arguments are options of methods.
        plugins: Modules to import first.
        preset: Says which methods are meant where none are named.
        chosen: By kind (`criterion`, `allocation`, `recovery`), the name given; None: the preset's.

    Returns:
        By kind, what `PruneConfig` takes.

    Raises:
        ValueError: (as InputError) an option is of no method that was chosen, or its value has the wrong type.
    """
    for module in plugins or []:
        import_plugin(module)
    given = _options(context)
    row = PRESETS.get(preset) or PRESETS["default"]  # an unknown one is refused with the other settings
    result: dict[str, Method | str | None] = dict(chosen)
    used: set[tuple[str, str]] = set()
    for kind, name in chosen.items():
        method = METHODS[kind].all().get(name or row[kind])
        if method is None:
            continue
        hints = get_type_hints(method.Settings)
        own = {(of, option): value for (of, option), value in given.items() if of == method.name and option in hints}
        if own:
            settings = {option: _value(_flag(of, option), value, hints[option]) for (of, option), value in own.items()}
            result[kind] = METHODS[kind].make(method.name, {**row["settings"].get(method.name, {}), **settings})
        used |= set(own)
    for of, option in sorted(set(given) - used):
        raise InputError(f"{_flag(of, option)} is no option of the methods of this run; {_known(result, row)}.")
    return result


def _options(context: typer.Context) -> dict[tuple[str, str], str | None]:
    """Values by method and option; None: a flag."""
    found: dict[tuple[str, str], str | None] = {}
    waiting = list(context.args)
    while waiting:
        word = waiting.pop(0)
        match = _OPTION.fullmatch(word)
        if match is None:
            if word.startswith("-"):
                raise InputError(f"There is no option {word}.{_meant(word, context)}")
            raise InputError(f"There is an argument too many, {word!r}; a value with spaces has to be in quotes.")
        name, option, value = match[1], match[2].replace("-", "_"), match[3]
        if value is None and waiting and not waiting[0].startswith("--"):
            value = waiting.pop(0)
        found[name, option] = value
    return found


def _flag(method: str, option: str) -> str:
    return f"--{method}.{option.replace('_', '-')}"


def _meant(word: str, context: typer.Context) -> str:
    """What may have been meant by an unknown option, as a sentence."""
    known = [option for parameter in context.command.params for option in parameter.opts]
    methods = [method for registry in METHODS.values() for method in registry.all().values()]
    of_methods = [_flag(method.name, option) for method in methods for option in get_type_hints(method.Settings)]
    name = word.partition("=")[0]
    close = [option for option in of_methods if option.endswith(f".{name[2:]}")]
    close += difflib.get_close_matches(name, [*known, *of_methods], 1, cutoff=0.75)
    return f" Did you mean {close[0]}?" if close else " Options of a method are written --METHOD.OPTION VALUE."


def _value(name: str, text: str | None, hint: Any) -> Any:
    """A value of a type from its text."""
    kinds = get_args(hint) or (hint,)
    if bool in kinds:
        if text is None or text.lower() in ("true", "false"):
            return text is None or text.lower() == "true"
        raise InputError(f"{name} is a switch and takes true or false, got {text!r}.")
    if text is None:
        raise InputError(f"{name} needs a value.")
    for kind in kinds:
        if kind in (int, float, str):
            try:
                return kind(text)
            except ValueError:
                continue
    words = {int: "an integer", float: "a number"}
    wanted = " or ".join(words[kind] for kind in kinds if kind in words)
    raise InputError(f"{name} must be {wanted}, got {text!r}.")


def _known(chosen: dict[str, Method | str | None], row: dict[str, Any]) -> str:
    """Which options there are, in words."""
    words = []
    for kind, one in chosen.items():
        name = one.name if isinstance(one, Method) else one or row[kind]
        if (method := METHODS[kind].all().get(name)) is not None:
            words += [_flag(name, option) for option in get_type_hints(method.Settings)]
    return f"there are {', '.join(words)}" if words else "they have no options"
