"""Methods on the command line: plug-ins, and the options of methods, such as `--layer-importance.alpha 5`."""

from __future__ import annotations

import difflib
import re
from typing import Any, get_args, get_type_hints

import typer
from typer.core import TyperCommand

from slimllm.cli.help import epilog, set_groups
from slimllm.cli.settings import help_of
from slimllm.config import METHODS
from slimllm.errors import InputError
from slimllm.plugins import EXPORTERS, Method, Registry, import_plugin
from slimllm.presets import DEFAULT, PRESETS

_OPTION = re.compile(r"--([a-z0-9-]+)\.([a-z0-9-]+)(?:=(.*))?", re.DOTALL)
_KEY = "slimllm.options"
_REGISTRIES: dict[str, Registry[Any]] = {**METHODS, "exporter": EXPORTERS}


class MethodCommand(TyperCommand):
    """A command that takes options of methods in any position, and suggests an option in place of an unknown one."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        taken = ["exporter"] if self.name == "export" else METHODS
        methods = [method for kind in taken for method in _REGISTRIES[kind].all().values()]
        options = [_about(method, option) for method in methods for option in get_type_hints(method.Settings)]
        self.epilog = epilog(str(self.name), options)
        set_groups(self)
        super().format_help(ctx, formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for number, word in enumerate(args):  # plug-ins first, as they define which options are switches
            if word == "--plugin" and number + 1 < len(args):
                import_plugin(args[number + 1])
            elif word.startswith("--plugin="):
                import_plugin(word.partition("=")[2])
        ctx.meta[_KEY], rest = _take_out(args)
        try:
            return super().parse_args(ctx, rest)
        except Exception as error:  # of click, or of typer's own copy of it
            if type(error).__name__ != "NoSuchOption":
                raise
            name: str = error.option_name  # type: ignore[attr-defined]
            raise InputError(f"There is no option {name}.{_meant(name, ctx)}") from None


def chosen_methods(context: typer.Context, preset: str = DEFAULT, **chosen: str | None) -> dict[str, Method | str | None]:
    """Return the chosen methods, with their options.

    Args:
        context: The context of a `MethodCommand`.
        preset: The preset whose methods are used where none is named.
        chosen: The given name by kind (`criterion`, `allocation`, `recovery`, `exporter`); None: the preset's.

    Returns:
        A name or a method, by kind.

    Raises:
        ValueError: (as InputError) an option belongs to none of the chosen methods, or its value has the wrong type.
    """
    options = _Options(context)
    result = options.of(preset, chosen)
    options.check_used()
    return result


def rows_with_options(context: typer.Context, rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return rows of settings, by name, with the options of their methods; an option applies to every row with its method.

    Raises:
        ValueError: (as InputError) as `chosen_methods`.
    """
    options = _Options(context)
    result = {}
    for name, row in rows.items():
        preset = row.get("preset", DEFAULT)
        result[name] = {**row, **options.of(preset, {kind: row.get(kind) for kind in METHODS})}
    options.check_used()
    return result


class _Options:
    """The options of methods on a command line, and which of them have been used."""

    def __init__(self, context: typer.Context) -> None:
        self._given: dict[tuple[str, str], str | None] = context.meta[_KEY]
        self._used: set[tuple[str, str]] = set()
        self._known: list[str] = []

    def of(self, preset: str, chosen: dict[str, str | None]) -> dict[str, Method | str | None]:
        row = PRESETS.get(preset) or PRESETS[DEFAULT]  # an unknown one is rejected with the other settings
        result: dict[str, Method | str | None] = dict(chosen)
        for kind, name in chosen.items():
            method = _REGISTRIES[kind].all().get(name or row[kind])
            if method is None:
                _REGISTRIES[kind].make(name)  # raises, and lists the methods
                continue
            hints = get_type_hints(method.Settings)
            self._known += [_flag(method.name, option) for option in hints]
            own = {key: value for key, value in self._given.items() if key[0] == method.name and key[1] in hints}
            if own:
                settings = {option: _value(_flag(of, option), value, hints[option]) for (of, option), value in own.items()}
                of_preset = row["settings"].get((kind, method.name), {})
                result[kind] = _REGISTRIES[kind].make(method.name, {**of_preset, **settings})
            self._used |= set(own)
        return result

    def check_used(self) -> None:
        known = list(dict.fromkeys(self._known))
        for of, option in sorted(set(self._given) - self._used):
            if any(method.name == of and option in get_type_hints(method.Settings) for method in _methods()):
                unused = f"{_flag(of, option)} is an option of {of}, which this run does not use"
                raise InputError(f"{unused}; give {_choice(of)}, or leave out the option.")
            there = f"there are {', '.join(known)}" if known else "they have no options"
            raise InputError(f"{_flag(of, option)} is not an option of the methods of this run; {there}.")


def with_methods(context: typer.Context, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a run, with the options of its methods."""
    if not context.meta[_KEY]:
        return settings  # methods are made of their names, after the other settings have been checked
    chosen = chosen_methods(context, settings["preset"], **{kind: settings[kind] for kind in METHODS})
    return {**settings, **chosen}


def _take_out(arguments: list[str]) -> tuple[dict[tuple[str, str], str | None], list[str]]:
    """Split arguments into the options of methods, by method and option (None: no value was given), and all others."""
    found: dict[tuple[str, str], str | None] = {}
    rest: list[str] = []
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        match = _OPTION.fullmatch(word)
        if match is None:
            rest.append(word)
            continue
        name, option, value = match[1], match[2].replace("-", "_"), match[3]
        if value is None and waiting and _is_value(waiting[0], name, option):
            value = waiting.pop(0)
        found[name, option] = value
    return found, rest


def _is_value(word: str, name: str, option: str) -> bool:
    """Return whether the word after an option is its value; a switch needs none."""
    hints = [get_type_hints(method.Settings) for method in _methods() if method.name == name]
    switch = any(bool in (get_args(own[option]) or (own[option],)) for own in hints if option in own)
    return not word.startswith("--") and (not switch or word.lower() in ("true", "false"))


def _methods() -> list[type[Method]]:
    return [method for registry in _REGISTRIES.values() for method in registry.all().values()]


def _choice(method: str) -> str:
    """Return the option that chooses a method, such as `--criterion obs`."""
    kind = next(kind for kind, registry in _REGISTRIES.items() if method in registry.all())
    return f"--{'to' if kind == 'exporter' else kind} {method}"


def _flag(method: str, option: str) -> str:
    return f"--{method}.{option.replace('_', '-')}"


def _about(method: type[Method], option: str) -> str:
    """Return a line about an option: its name, default and meaning."""
    default = getattr(method.Settings(), option)
    meaning = help_of(method.Settings).get(option, "")
    return f"{_flag(method.name, option)} (default: {default}). {meaning}".rstrip()


def _meant(name: str, context: Any) -> str:
    """Return a sentence that suggests an option in place of an unknown one."""
    known = [option for parameter in context.command.params for option in parameter.opts]
    close = difflib.get_close_matches(name, known, 1, cutoff=0.75)
    if not close:
        of_methods = [_flag(method.name, option) for method in _methods() for option in get_type_hints(method.Settings)]
        close = [option for option in of_methods if option.endswith(f".{name.lstrip('-')}")]
        close += difflib.get_close_matches(name, of_methods, 1, cutoff=0.75)
    return f" Did you mean {close[0]}?" if close else " Options of a method are written --METHOD.OPTION VALUE."


def _value(name: str, text: str | None, hint: Any) -> Any:
    """Convert the text of a value to its type."""
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
