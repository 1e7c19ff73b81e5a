"""Registries that find methods by name: built-in methods, methods of other packages, and methods of an imported module.

A method is a class that registers itself. Built-in methods are found because their files are in the folder for their kind.
Methods of other packages are found by an entry point (`slimllm.criteria`, `slimllm.recoveries`, `slimllm.allocations`,
`slimllm.exporters`), whose value is the class. All others are found by importing the module that registers them
(`--plugin MODULE`).
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import math
import os
import pkgutil
import re
import sys
import threading
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, get_args, get_type_hints

from slimllm.errors import HopelessError, InputError

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,49}")
_KINDS = {bool: "True or False", int: "an integer", float: "a number", str: "a string", type(None): "None"}
_log = logging.getLogger("slimllm")


class MethodError(HopelessError):
    """Failure or invalid result of a method from outside the package."""


class Method:
    """Base class of methods, each with a name and its own options.

    `MyScore(power=3.0)` makes a method. Its options are the fields of its `Settings`, a frozen dataclass whose fields are
    booleans, integers, numbers, strings or None, with defaults. Two methods are equal if their classes and settings are.

    Raises:
        TypeError: an option is unknown or of another type than its field.
        ValueError: (as InputError) a number is not finite.
    """

    name: ClassVar[str] = ""
    version: ClassVar[str] = "1"  # part of a run's identity: change it when the same settings give a different result

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
                wanted = " or ".join(_KINDS[kind] for kind in kinds)
                raise TypeError(f"{self.name}.{name} must be {wanted}, got {value!r}.")
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{self.name}.{name} must be a finite number, got {value}.")
        self.settings: Any = self.Settings(**settings)

    def describe(self) -> dict[str, Any]:
        """Return the options as plain JSON types, by name."""
        return dataclasses.asdict(self.settings)

    @property
    def is_foreign(self) -> bool:
        """Whether the method is from outside the package."""
        return type(self).__module__.partition(".")[0] != "slimllm"

    def code(self) -> str:
        """Identify the code: the class, its version, and for a foreign method a checksum of its and its bases' files."""
        crc = 0
        for kind in type(self).__mro__:
            if kind.__module__.partition(".")[0] not in ("slimllm", "builtins", "abc"):
                try:
                    crc = zlib.crc32(Path(inspect.getfile(kind)).read_bytes(), crc)
                except (OSError, TypeError):  # defined in an interactive session, so there is no file
                    pass
        name = f"{type(self).__module__}.{type(self).__qualname__}"
        return f"{name} {self.version}{f' {crc:08x}' if crc else ''}"

    def __repr__(self) -> str:
        changed = {
            field.name: value
            for field in dataclasses.fields(self.settings)
            if (value := getattr(self.settings, field.name)) != field.default
        }
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in changed.items())})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.settings == other.settings  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash((type(self), self.settings))


@contextmanager
def calling(method: Method, where: str) -> Iterator[None]:
    """Turn an exception of a foreign method into a sentence that names the method, and log its traceback.

    Args:
        method: The method that is called.
        where: Where it is called, as in "failed in …".

    Raises:
        ValueError: (as MethodError) the method raised something other than an InputError.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not method.is_foreign:
            raise
        _log.exception("%s failed in %s.", method.name, where)
        raise MethodError(f"The method {method.name} failed in {where} ({type(error).__name__}: {error}).") from error


_Method = TypeVar("_Method", bound=Method)


class Registry(Generic[_Method]):
    """Registry of the methods of one kind, by name.

    Args:
        kind: Name of the kind, as in the settings, such as `criterion`.
        folder: The package whose files register the built-in methods; its module `base` has their base class.
        group: The group of entry points for other packages.
    """

    def __init__(self, kind: str, folder: str, group: str) -> None:
        self.kind, self.group, self._folder = kind, group, folder
        self._found: dict[str, type[_Method]] = {}
        self._broken: dict[str, str] = {}  # methods that cannot be imported, and why
        self._lock = threading.RLock()
        self._builtins_loaded = self._loaded = False

    def register(self, name: str) -> Callable[[type[_Method]], type[_Method]]:
        """Return a decorator that registers a class under a name.

        Raises:
            ValueError: the name has other characters than a-z, 0-9 and -, or another class has it.
            TypeError: it is not a class of this kind, or its `Settings` are not a frozen dataclass of such fields.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"the name of a {self.kind} has the characters a-z, 0-9 and -, got {name!r}.")

        def add(method: type[_Method]) -> type[_Method]:
            self._check(method)
            with self._lock:
                if not method.__module__.startswith(f"{self._folder}."):
                    self._load_builtins()
                other = self._found.get(name)
                if other is not None and _address(other) != _address(method):
                    raise ValueError(f"there is a {self.kind} {name} already, {'.'.join(_address(other))}.")
                method.name = name
                self._found[name] = method
            return method

        return add

    def _check(self, method: object) -> None:
        base = getattr(sys.modules.get(f"{self._folder}.base"), self.kind.capitalize(), Method)
        if not (isinstance(method, type) and issubclass(method, base)):
            raise TypeError(f"a {self.kind} is a subclass of {base.__module__}.{base.__name__}, got {method!r}.")
        settings: Any = method.Settings
        if not dataclasses.is_dataclass(settings) or not getattr(settings, "__dataclass_params__").frozen:  # noqa: B009
            raise TypeError(f"Settings of {method.__name__} must be a dataclass with frozen=True.")
        for field in dataclasses.fields(settings):
            hint = get_type_hints(settings)[field.name]
            if field.default is dataclasses.MISSING or not set(get_args(hint) or (hint,)) <= set(_KINDS):
                raise TypeError(
                    f"the option {field.name} of {method.__name__} must be a bool, int, float or str, or None, and have a "
                    "default."
                )

    def _load_builtins(self) -> None:
        if not self._builtins_loaded:
            self._builtins_loaded = True
            package = importlib.import_module(self._folder)
            for module in pkgutil.iter_modules(package.__path__):
                try:
                    importlib.import_module(f"{self._folder}.{module.name}")
                except ModuleNotFoundError as error:  # a dependency that this method alone has
                    if error.name is None or error.name.partition(".")[0] == "slimllm":
                        raise
                    self._broken[module.name] = f"{error}; install it"

    def all(self) -> dict[str, type[_Method]]:
        """Return every registered method that can be imported, by name."""
        with self._lock:
            self._load_builtins()
            if not self._loaded:
                self._loaded = True
                for entry in importlib.metadata.entry_points(group=self.group):
                    try:
                        method = entry.load()
                        if "name" not in vars(method):
                            self.register(entry.name)(method)
                        elif method.name != entry.name:
                            raise ValueError(f"it is registered as {method.name}; give the entry point that name")
                    except Exception as error:
                        self._broken[entry.name] = f"{entry.value}: {type(error).__name__}: {error}"
                        _log.warning("The %s %s cannot be used (%s).", self.kind, entry.name, self._broken[entry.name])
            return dict(sorted(self._found.items()))

    def make(self, given: object, settings: Mapping[str, Any] | None = None) -> _Method:
        """Make a method from its name and options, or return `given` if it is a method already.

        Raises:
            ValueError: (as InputError) no method has the name, or the method cannot be imported.
            TypeError: `given` is neither a name nor a method of this kind, or an option is unknown or of another type.
        """
        known = self.all()
        if isinstance(given, Method):
            registered = known.get(given.name)
            if registered is not None and _address(registered) == _address(type(given)):
                return given  # type: ignore[return-value]
        if not isinstance(given, str):
            raise TypeError(
                f"{self.kind} must be a name or a registered {self.kind} such as {next(iter(known.values())).__name__}(), "
                f"got {given!r}."
            )
        if given not in known:
            if given in self._broken:
                raise InputError(
                    f"The {self.kind} {given} cannot be imported ({self._broken[given]}); repair its package, or do "
                    "without it."
                )
            raise InputError(
                f"{self.kind} must be one of {', '.join(known)}, got {given!r}; import your own with --plugin."
            )
        return known[given](**(settings or {}))


def _address(method: type) -> tuple[str, str]:
    return method.__module__, method.__qualname__


def import_plugin(module: str) -> None:
    """Import a module that registers methods, given by its name or by a path that ends in .py.

    A name may also be that of a module in the working directory.

    Raises:
        ValueError: (as InputError) the module cannot be imported.
    """
    try:
        if module.endswith(".py"):
            _import_file(Path(module).expanduser().resolve())
        else:
            sys.path.append(os.getcwd())
            try:
                importlib.import_module(module)
            finally:
                sys.path.pop()
    except (Exception, SystemExit) as error:
        *_, last = traceback.extract_tb(error.__traceback__)
        where = "" if last.filename == __file__ or "importlib" in last.filename else f", {last.filename}:{last.lineno}"
        raise InputError(f"The plug-in {module} cannot be imported ({type(error).__name__}: {error}{where}).") from error


def _import_file(path: Path) -> None:
    name = f"slimllm_plugin_{path.stem}_{zlib.crc32(str(path).encode()):08x}"  # unique
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"there is no file {path}")
    checksum = zlib.crc32(path.read_bytes())
    if getattr(sys.modules.get(name), "_checksum", None) == checksum:  # loaded and unchanged
        return
    loaded = importlib.util.module_from_spec(spec)
    loaded._checksum = checksum  # type: ignore[attr-defined]
    sys.modules[name] = loaded
    try:
        spec.loader.exec_module(loaded)
    except BaseException:
        del sys.modules[name]
        raise


CRITERIA: Registry[Any] = Registry("criterion", "slimllm.methods.criteria", "slimllm.criteria")
RECOVERIES: Registry[Any] = Registry("recovery", "slimllm.methods.recovery", "slimllm.recoveries")
ALLOCATIONS: Registry[Any] = Registry("allocation", "slimllm.methods.allocation", "slimllm.allocations")
EXPORTERS: Registry[Any] = Registry("exporter", "slimllm.export", "slimllm.exporters")
