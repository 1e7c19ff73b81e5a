"""The commands for a lent GPU: limits, archives, and both of them at small sizes on a simulated GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


def test_a_step_that_fails_or_hangs_leaves_the_rest(gpu: Any, tmp_path: Path) -> None:
    """And the archive has every log, row and exit status, whatever happened; the temporary folder is empty."""
    steps = {
        "writes.py": "import os, pathlib, tempfile; pathlib.Path(os.environ['SLIMLLM_RESULTS'], 'gram.jsonl')"
        ".write_text('{}\\n'); tempfile.mkstemp(); print('measured')",
        "fails.py": "import sys; print('what went wrong'); sys.exit(3)",
        "hangs.py": "import time; print('slow', flush=True); time.sleep(600)",
        "last.py": "print('still here')",
    }
    for name, source in steps.items():
        (tmp_path / name).write_text(source)
    folder, out, results = (tmp_path / name for name in ("work", "out", "results"))
    for one in (folder, out, results):
        one.mkdir()
    runner = gpu.Runner("bench", folder, 60, out)
    assert not runner.run([gpu.Step(name, str(tmp_path / name), 6) for name in steps])
    assert [path.name for path in out.iterdir()] == ["gpu-bench.tar.gz"]
    with tarfile.open(out / "gpu-bench.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    kept = tmp_path / "gpu-bench"
    told = [json.loads(line) for line in (kept / "steps.jsonl").read_text().splitlines()]
    assert [one["status"] for one in told] == ["done", "failed with exit status 3", "stopped after 6 s", "done"]
    assert "what went wrong" in (kept / "2-fails.py.log").read_text() and "slow" in (kept / "3-hangs.py.log").read_text()
    assert (kept / "results" / "gram.jsonl").read_text() == "{}\n" and not (kept / "tmp").exists()
    (results / "gram.jsonl").write_text('{"before": 1}\n')
    gpu.keep_rows(folder / "results", results)
    assert (results / "gram.jsonl").read_text() == '{"before": 1}\n{}\n'


def test_no_step_starts_without_time(gpu: Any, tmp_path: Path) -> None:
    runner = gpu.Runner("check", tmp_path, 10, None)
    assert not runner.run([gpu.Step("late", "-c pass", 60)])
    assert json.loads((tmp_path / "steps.jsonl").read_text())["status"] == "no time left"


def test_limits(gpu: Any) -> None:
    """Steps are real files, and those of a check fit into the four minutes that it may take, one after another."""
    for steps in gpu.STEPS.values():
        for step in steps:
            for arguments in (step.arguments, step.small or ""):
                assert all((ROOT / word).exists() for word in arguments.split() if word.startswith(("bench", "tests")))
    assert gpu.MOST_S["check"] < 240 and gpu.MOST_S["bench"] < 600


@pytest.mark.slow
@pytest.mark.parametrize("what", ["check", "bench"])
def test_dry_run(what: str, tmp_path: Path) -> None:
    """Every step, at small sizes, on a simulated GPU."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "tests" / "gpu"),
        "SIMULATED_CUDA": "1",
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "OUT": str(tmp_path),
    }
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), what, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]
    assert [path.name for path in tmp_path.iterdir()] == [f"gpu-{what}.tar.gz"]
    print(done.stdout)
