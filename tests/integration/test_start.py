"""What needs neither torch nor transformers does not wait for them: they take seconds to import."""

from __future__ import annotations

import subprocess
import sys

import pytest

SLOW = ("torch", "transformers", "numpy", "matplotlib", "datasets")
CODE = f"""
import sys
sys.argv[0] = "slimllm"
from slimllm.cli import main
try:
    main()
finally:
    print("imported:", [name for name in {SLOW} if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--help"], 0, "Structured pruning"),
        (["--version"], 0, ""),
        (["eval", "--help"], 0, "Usage"),
        (["finetune", "--help"], 0, "--lr"),
        (["prune", "model"], 2, "Missing option '--out'"),
        (["prune", "model", "--out", "x", "--ratio", "much"], 2, "is not a number"),
        (["prune", "model", "--out", "x", "--ratio", "2"], 2, "must lie between 0 and 1, got 2.0"),
        (["prune", "model", "--out", "x", "--ratio", "0.2", "--sample", "3"], 2, "Did you mean --samples?"),
        (["prune", "model", "--out", "x", "--ratio", "0.2", "--preset", "bset"], 2, "one of best, slimllm, paper"),
        (["plan", "model", "--host-memory", "much"], 2, "host_memory is an amount of memory"),
        (["finetune", "model", "--data", "x", "--out", "y", "--epochs", "0"], 2, "epochs must be at least 1"),
    ],
)
def test_a_wrong_argument_is_refused_before_torch_is_imported(arguments: list[str], code: int, sentence: str) -> None:
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True)
    assert done.returncode == code and sentence in done.stdout + done.stderr
    assert "imported: []" in done.stderr


def test_methods_are_known_without_transformers() -> None:
    code = "import sys, slimllm; slimllm.PruneConfig(ratio=0.2, preset='best'); sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_package_offers_what_it_says() -> None:
    import slimllm

    assert set(slimllm.__all__) <= set(dir(slimllm)) and all(hasattr(slimllm, name) for name in slimllm.__all__)
    assert slimllm.export.export and slimllm.__version__
    with pytest.raises(AttributeError, match="has no attribute 'prun'"):
        slimllm.prun  # noqa: B018
    with pytest.raises(ImportError):
        from slimllm import nothing  # noqa: F401


def test_importing_the_package_changes_nothing() -> None:
    """Neither the environment of the program that imports it, nor what it has loaded."""
    code = "import os; before = dict(os.environ); import slimllm, sys; print(os.environ == before, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"]
