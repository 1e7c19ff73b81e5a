"""The shape of the project itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import slimllm

PACKAGE = Path(slimllm.__file__).parent
# The way of the data: a module imports only from those before it.
ORDER = [
    "errors", "foreign_json", "parallel", "interrupts", "config", "memory", "families", "budget", "modeling",
    "registration", "folder", "headers", "companions", "tokenizer", "kernels", "ops", "statistics", "importance",
    "criteria", "selection", "recovery", "elimination", "spending", "allocation", "slicing", "states", "native", "progress",
    "layer", "measure", "sensitivity", "attention", "ffn", "account", "plan", "journal", "record", "skeleton",
    "destination", "checkpoint", "gguf_header", "gguf_file", "gguf_rope", "checkpoint_gguf", "checkpoint_fused",
    "calibration", "source", "dense", "pipeline", "report", "tensor_parallel", "modelcard", "writer", "run", "jobs",
    "engine", "padding", "gguf_vocabulary", "export_source", "export_gguf", "export", "bench", "evaluate", "zeroshot",
    "side_by_side", "latency", "finetune", "page", "doctor", "display", "demo", "compare", "compare_display", "sweep",
    "sweep_display", "cli", "__main__", "__init__",
]  # fmt: skip


def imports_of(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "slimllm":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found & set(ORDER)


@pytest.mark.parametrize("file", sorted(PACKAGE.glob("**/*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_one_way(file: Path) -> None:
    module = (file.parent if file.parent != PACKAGE else file).stem  # a package counts as one
    position = ORDER.index(module)
    allowed_lazily = {"checkpoint": {"checkpoint_gguf", "checkpoint_fused"}}.get(module, set())
    assert imports_of(file) - allowed_lazily <= set(ORDER[:position]) | {module}


def test_files_stay_short() -> None:
    root = PACKAGE.parent
    for file in [*PACKAGE.glob("**/*.py"), *(root / "benchmarks").glob("*.py"), *(root / "kernels").glob("*.py")]:
        assert len(file.read_text().splitlines()) <= 300, file.name


def test_extension_or_its_absence() -> None:
    """Where it was built, it says how."""
    try:
        from slimllm import _C
    except ImportError:
        pytest.skip("the extension was not built")
    info = _C.build_info()
    assert info["cpp_standard"] >= 201703 and info["compiler"] and info["operations"]
