"""The shape of the project itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import slimllm

PACKAGE = Path(slimllm.__file__).parent
# The way of the data: a folder imports only from those before it.
ORDER = [
    "_lazy",
    "errors",
    "plugins",
    "checks",
    "presets",
    "config",
    "kernels",
    "ops",
    "statistics",
    "runtime",
    "models",
    "checkpoints",
    "calibration",
    "methods",
    "pruning",
    "export",
    "evaluation",
    "finetuning",
    "experiments",
    "report",
    "cli",
    "__main__",
    "__init__",
]
FILES = sorted(PACKAGE.glob("**/*.py"))


def module_of(file: Path) -> str:
    parts = ("slimllm", *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


def imports_of(file: Path) -> set[str]:
    """The modules of the package that a file imports, at any place in it."""
    known = {module_of(other) for other in FILES}
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "slimllm":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else node.module)
    return found - {module_of(file)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_one_way(file: Path) -> None:
    def folder(module: str) -> str:
        return module.split(".")[1] if "." in module else "__init__"

    position = ORDER.index(folder(module_of(file)))
    assert {folder(module) for module in imports_of(file)} <= set(ORDER[: position + 1])


def test_no_circle_of_imports() -> None:
    left = {module_of(file): imports_of(file) for file in FILES}
    while free := {module for module, needed in left.items() if not needed & set(left)}:
        left = {module: needed for module, needed in left.items() if module not in free}
    assert not left


def test_files_stay_short() -> None:
    root = PACKAGE.parent
    for file in [*PACKAGE.glob("**/*.py"), *(root / "benchmarks").glob("*.py"), *(root / "kernels").glob("*.py")]:
        # A kernel has its reference, its configurations and its wrapper in one file, and long signatures.
        most = 360 if file.parent.name == "kernels" else 320
        assert len(file.read_text().splitlines()) <= most, file.name


def test_extension_or_its_absence() -> None:
    """Where it was built, it says how."""
    try:
        from slimllm import _C
    except ImportError:
        pytest.skip("the extension was not built")
    info = _C.build_info()
    assert info["cpp_standard"] >= 201703 and info["compiler"] and info["operations"]
