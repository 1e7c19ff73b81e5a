"""A machine without the package gguf: only GGUF files need it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import STORIES

CODE = """
import sys
sys.modules["gguf"] = None  # importing it raises ModuleNotFoundError
from pathlib import Path
import slimllm
from slimllm.export.api import export
model, out = sys.argv[1], Path(sys.argv[2])
slimllm.prune(model, out / "pruned", slimllm.PruneConfig(0.2, "slimllm", samples=2, seq_len=16))
export(out / "pruned", out / "padded", "padded")
(out / "model.gguf").write_bytes(b"GGUF")
for call in (
    lambda: slimllm.prune(out / "model.gguf", out / "never", slimllm.PruneConfig(0.2, "slimllm")),
    lambda: export(out / "pruned", out / "never.gguf", "gguf"),
):
    try:
        call()
    except slimllm.InputError as error:
        print(error)
"""


def test_folders_are_pruned_and_exported(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CODE, str(STORIES), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reading, writing = done.stdout.splitlines()
    assert reading == "A GGUF file is read with the package gguf, which is not installed."
    assert writing.startswith("The exporter gguf cannot be imported (") and "install it" in writing
