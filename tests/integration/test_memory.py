"""Memory: what evaluation takes at once, and a sentence where there is not enough."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORIES, random_llama

import slimllm
from slimllm.errors import exhausted
from slimllm.evaluation import perplexity as evaluate
from slimllm.runtime import memory


@pytest.mark.parametrize("bound", ["limit", "free"])
def test_fewer_windows_at_once_where_logits_are_large(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 windows of 64 tokens of a vocabulary of 4096 are 8 MiB of logits, of which 3 MiB are allowed."""
    model = random_llama(vocab_size=4096)
    stream = torch.randint(4096, (64 * 16,), generator=torch.Generator().manual_seed(0))
    sizes: list[int] = []
    model.register_forward_hook(lambda module, given, output: sizes.append(len(output.logits)))
    before = slimllm.perplexity(model, stream, seq_len=64)
    assert sizes == [8, 8]
    if bound == "limit":
        monkeypatch.setattr(evaluate, "_LOGITS_BYTES", 3 * 2**20)
    else:
        monkeypatch.setattr(evaluate, "free_bytes", lambda device: 12 * 2**20)
    sizes.clear()
    assert slimllm.perplexity(model, stream, seq_len=64) == pytest.approx(before, rel=1e-5)
    assert sizes == [3] * 5 + [1]
    monkeypatch.setattr(evaluate, "_LOGITS_BYTES", 1)
    sizes.clear()
    assert slimllm.perplexity(model, stream, seq_len=64, max_windows=2) > 0 and sizes == [1, 1]


def test_free_memory_is_the_systems() -> None:
    if not Path("/proc/meminfo").exists():
        pytest.skip("not Linux")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0.001 * total < memory.free_bytes(torch.device("cpu")) <= total


def test_errors_of_memory_are_known() -> None:
    def allocate() -> Any:
        return torch.empty(2**60, dtype=torch.int8)

    with pytest.raises(RuntimeError) as error:
        allocate()
    assert exhausted(error.value) == "CPU" and exhausted(MemoryError()) == "CPU"
    assert exhausted(torch.OutOfMemoryError("CUDA out of memory.")) == "GPU"
    assert exhausted(RuntimeError("shapes cannot be multiplied")) is None


LIMITED = """
import resource, sys
from slimllm import cli
from slimllm.pruning import api as engine
from slimllm.evaluation import perplexity as evaluate
from slimllm import finetuning as finetune
import slimllm.evaluation.side_by_side, slimllm.finetuning.train
import torch
torch.ones(512, 512) @ torch.ones(512, 512)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv.pop(1)) * 2**20,) * 2)
cli.main()
"""


PRUNE = ["prune", STORIES, "--out", "out", "--ratio", "0.2", "--seq-len", "512", "--samples", "900", "--batch-size", "900"]
EVAL = ["eval", STORIES, "--batch-size", "4096", "--seq-len", "512"]


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of a process's memory is Linux's")
@pytest.mark.parametrize(
    ("arguments", "more", "sentence"),
    [
        (PRUNE, 600, "or lower --samples, --seq-len or --batch-size"),
        pytest.param(EVAL, 250, "lower --batch-size or --seq-len", marks=pytest.mark.slow),
    ],
)
def test_too_little_memory_is_a_sentence(arguments: list[str], more: int, sentence: str, tmp_path: Path) -> None:
    """So many MiB more than after importing are enough for the tokenizer, whose library aborts where it has too little."""
    command = [sys.executable, "-c", LIMITED, str(more), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert "There is not enough CPU memory; " in done.stderr and sentence in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()
