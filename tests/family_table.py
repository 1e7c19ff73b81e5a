"""The table of families in docs/reference/families.md, from a tiny model of each: what can be made of it, and loaded.

    python tests/family_table.py         (make families) writes the table

What transformers loads is run, and padded models are compared with those that were padded. llama.cpp and vLLM themselves
are run by make test-llama-cpp and make test-vllm; here a GGUF file is written and read, and vLLM is asked what it knows.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import COMMON, IDS, LIKE_LLAMA_CPP, MIXTURES, PECULIAR, saved, tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from vision_language_models import ALIKE, MODELS, made

import slimllm
from slimllm import InputError, PruneConfig
from slimllm.checkpoints.opening import open_checkpoint
from slimllm.export import gguf as export_gguf
from slimllm.export.api import export
from slimllm.models.families import CONTAINERS, family_of

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "reference" / "families.md"
BEGIN, END = "<!-- table families -->\n", "<!-- end -->"
COLUMNS = (
    "`model_type`",
    "prune, load",
    "LoRA (peft)",
    "`--for transformers`",
    "`--to padded`",
    "`--for llama.cpp`",
    "read from GGUF",
    "`--for vllm`",
)
STORIES = ROOT / "slimllm" / "calibration" / "data" / "stories260k"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def cell(make: Callable[[], str]) -> str:
    """Return what a function makes, or a dash if it is refused."""
    try:
        return make()
    except InputError:
        return "–"


class Row:
    """The cells of one family, made in a folder of its own."""

    def __init__(self, source: Path, folder: Path, kind: type) -> None:
        self.source, self.folder, self.kind = source, folder, kind

    def pruned(self, name: str, **settings: Any) -> slimllm.PruneReport:
        return slimllm.prune(self.source, self.folder / name, PruneConfig(ratio=0.3, calibration=IDS, **settings))

    def load(self, name: str, trust: bool = False) -> Any:
        return self.kind.from_pretrained(self.folder / name, trust_remote_code=trust).eval()

    def native(self) -> str:
        self.pruned("native")
        assert logits(self.load("native", True)).isfinite().all()
        return "yes"

    def lora(self) -> str:
        model = self.load("native", True)
        tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
        assert logits(tuned.merge_and_unload()).isfinite().all()
        return "yes"

    def stock(self) -> str:
        form = self.pruned("stock", program="transformers").format
        assert logits(self.load("stock")).isfinite().all()
        return f"`{form}`"

    def padded(self) -> str:
        self.pruned("uneven", recovery="lstsq", bias="no")
        form = export(self.folder / "uneven", self.folder / "padded", "padded")
        assert torch.allclose(logits(self.load("padded")), logits(self.load("uneven", True)), atol=1e-4)
        return f"`{form}`"

    def gguf(self) -> str:
        self.pruned("for_gguf", program="llama.cpp")
        return f"`{export(self.folder / 'for_gguf', self.folder / 'm.gguf', 'gguf')}`"

    def from_gguf(self) -> str:
        self.pruned("alike", program="llama.cpp", allocation="uniform", recovery="lstsq", bias="no")
        names = family_of(open_checkpoint(self.source).config.model_type).gguf
        with mock.patch.object(export_gguf, "gguf_names", lambda *_: names) if names else nullcontext():
            export(self.folder / "alike", self.folder / "alike.gguf", "gguf")
        open_checkpoint(self.folder / "alike.gguf")
        return "yes"

    def vllm(self, known: dict[str, str]) -> str:
        form = self.pruned("for_vllm", program="vllm").format
        (architecture,) = self.load("for_vllm").config.architectures
        return f"`{form}`, {known.get(architecture, 'through transformers')}"  # what vLLM does with any other one


def known_to_vllm() -> dict[str, str]:
    """How vLLM runs each architecture, by asking it in its own environment."""
    python = ROOT / ".venv-vllm" / "bin" / "python"
    if not python.exists():
        sys.exit("vLLM has no environment here; make test-vllm makes it.")
    script = """
from vllm import ModelRegistry
from vllm.model_executor.models import registry
theirs = getattr(registry, "_TRANSFORMERS_SUPPORTED_MODELS", {})
for name in ModelRegistry.get_supported_archs():
    print("\\n@", name, "through transformers" if name in theirs else "its own")
"""
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True)
    lines = [line[2:].split(" ", 1) for line in done.stdout.splitlines() if line.startswith("@ ")]
    return {name: how for name, how in lines}


def rows() -> list[list[str]]:
    logging.getLogger("slimllm").setLevel(logging.ERROR)
    known, found = known_to_vllm(), []
    for name in [*PECULIAR, *MIXTURES, "phi3", *MODELS, *ALIKE]:
        with tempfile.TemporaryDirectory() as folder:
            whole = name in CONTAINERS
            model = None if whole else _plain(name)
            source = (
                made(name, Path(folder) / "dense", vocab_size=512)
                if model is None
                else saved(model, Path(folder) / "dense")
            )
            AutoTokenizer.from_pretrained(STORIES).save_pretrained(source)
            row = Row(source, Path(folder), AutoModelForImageTextToText if whole else AutoModelForCausalLM)
            cells = [row.native, row.lora, row.stock, row.padded, row.gguf, row.from_gguf, lambda: row.vllm(known)]  # noqa: B023
            found.append([f"`{name}`", *map(cell, cells)])
            print(*found[-1])
    return found


def _plain(name: str) -> Any:
    changes = LIKE_LLAMA_CPP.get(name, {})
    if name == "qwen2":
        changes = {"use_sliding_window": False, "sliding_window": None, "layer_types": None, "hidden_size": 96}
    if name == "phi3":
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("phi3", **{**COMMON, "vocab_size": 512}))
    return tiny(name, vocab_size=512, **changes)


def main() -> None:
    lines = [f"| {' | '.join(line)} |\n" for line in [list(COLUMNS), ["---"] * len(COLUMNS), *rows()]]
    text = TABLE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    TABLE.write_text(f"{before}{BEGIN}{''.join(lines)}{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
