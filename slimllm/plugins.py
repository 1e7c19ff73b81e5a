"""How methods are found by name: those of the package, those of others, and those of a module that is named.

A method is a class that registers itself. Files of the package are found by being in their folder, methods of other
packages by an entry point (`slimllm.criteria`, `slimllm.recoveries`, `slimllm.allocations`, `slimllm.exporters`), whose
value is the class, and all others by importing the module that registers them (`--plugin MODULE`).
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, get_args, get_type_hints

from slimllm.errors import InputError

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,49}")


class Method:
    """A method with a name and options of its own.

    `MyScore(power=3.0)` makes one; its options are the fields of its `Settings`, a frozen dataclass whose fields all have
    defaults. Two methods are equal if their names and settings are.

    Raises:
        TypeError: an option is unknown or of another type than its field.
    """

    name: ClassVar[str] = ""
    version: ClassVar[str] = "1"  # part of a run's identity: change it when the same settings give another result

    @dataclasses.dataclass(frozen=True)
    class Settings:
        """No options."""

    def __init__(self, **settings: Any) -> None:
        hints = get_type_hints(self.Settings)
        for name, value in settings.items():
            if name not in hints:
                known = f"its options are {', '.join(hints)}" if hints else "it has no options"
                raise TypeError(f"{self.name or type(self).__name__} has no option {name}; {known}.")
            kinds = get_args(hints[name]) or (hints[name],)
            if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
                settings[name] = value = float(value)
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise TypeError(f"{self.name}.{name} must be {_in_words(kinds)}, got {value!r}.")
        self.settings: Any = self.Settings(**settings)

    def describe(self) -> dict[str, Any]:
        """The options as plain JSON types, by name."""
        return dataclasses.asdict(self.settings)

    def __repr__(self) -> str:
        changed = {
            field.name: value
            for field in dataclasses.fields(self.settings)
            if (value := getattr(self.settings, field.name)) != field.default
        }
        if not changed:
            return repr(self.name)
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in changed.items())})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.settings == other.settings  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash((type(self), self.settings))


_Method = TypeVar("_Method", bound=Method)


class Registry(Generic[_Method]):
    """The methods of one kind, by name.

    Args:
        kind: What one of them is called, as in the settings: `criterion`.
        folder: The package whose files register the built-in ones.
        group: The group of entry points that others use.
    """

    def __init__(self, kind: str, folder: str, group: str) -> None:
        self.kind, self.group, self._folder = kind, group, folder
        self._found: dict[str, type[_Method]] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[type[_Method]], type[_Method]]:
        """Decorator: make a class known by a name.

        Raises:
            ValueError: the name has other characters than a-z, 0-9 and -, or another class has it.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"the name of a {self.kind} has the characters a-z, 0-9 and -, got {name!r}.")

        def add(method: type[_Method]) -> type[_Method]:
            other = self._found.get(name)
            if other is not None and (other.__module__, other.__qualname__) != (method.__module__, method.__qualname__):
                raise ValueError(f"there is a {self.kind} {name} already, {other.__module__}.{other.__qualname__}.")
            method.name = name
            self._found[name] = method
            return method

        return add

    def all(self) -> dict[str, type[_Method]]:
        """Every method that is known, by name.

        Raises:
            ValueError: (as InputError) one of an entry point cannot be imported.
        """
        if not self._loaded:
            self._loaded = True
            package = importlib.import_module(self._folder)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self._folder}.{module.name}")
            for entry in importlib.metadata.entry_points(group=self.group):
                try:
                    method = entry.load()
                    if method.name != entry.name:
                        self.register(entry.name)(method)
                except Exception as error:
                    raise InputError(
                        f"The {self.kind} {entry.name} of the entry point {entry.value} cannot be imported "
                        f"({type(error).__name__}: {error}); mend or uninstall the package it is from."
                    ) from error
        return dict(sorted(self._found.items()))

    def make(self, given: object, settings: Mapping[str, Any] | None = None) -> _Method:
        """A method from its name and options; one that is made already stays as it is.

        Raises:
            ValueError: (as InputError) no method has the name.
            TypeError: it is neither a name nor a method of this kind, or an option is unknown or of another type.
        """
        known = self.all()
        if isinstance(given, Method) and type(given) in known.values():
            return given  # type: ignore[return-value]
        if isinstance(given, (Method, type)):
            raise TypeError(
                f"{self.kind} must be a name or a registered {self.kind} such as {next(iter(known.values())).__name__}(), "
                f"got {given!r}."
            )
        if given not in known:
            raise InputError(f"{self.kind} must be one of {', '.join(known)}, got {given!r}.")
        return known[str(given)](**(settings or {}))


def import_plugin(module: str) -> None:
    """Import a module that registers methods, by its name or as a path that ends in .py.

    Raises:
        ValueError: (as InputError) it cannot be imported.
    """
    try:
        if module.endswith(".py"):
            path = Path(module).expanduser().resolve()
            spec = importlib.util.spec_from_file_location(path.stem, path)
            if spec is None or spec.loader is None or not path.is_file():
                raise ImportError(f"there is no file {path}")
            loaded = importlib.util.module_from_spec(spec)
            sys.modules[path.stem] = loaded
            spec.loader.exec_module(loaded)
        else:
            importlib.import_module(module)
    except Exception as error:
        raise InputError(f"The plug-in {module} cannot be imported ({type(error).__name__}: {error}).") from error


def _in_words(kinds: tuple[type, ...]) -> str:
    names = {bool: "True or False", int: "an integer", float: "a number", str: "a string", type(None): "None"}
    return " or ".join(names.get(kind, kind.__name__) for kind in kinds)


CRITERIA: Registry[Any] = Registry("criterion", "slimllm.methods.criteria", "slimllm.criteria")
RECOVERIES: Registry[Any] = Registry("recovery", "slimllm.methods.recovery", "slimllm.recoveries")
ALLOCATIONS: Registry[Any] = Registry("allocation", "slimllm.methods.allocation", "slimllm.allocations")
EXPORTERS: Registry[Any] = Registry("exporter", "slimllm.export", "slimllm.exporters")
