"""The commands for a lent GPU: limits, archives, and both of them at small sizes on a simulated GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
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


def test_an_interrupt_keeps_what_was_measured(gpu: Any, tmp_path: Path) -> None:
    """And ends the step with all that it has started."""
    child = "import os, time; open(os.environ['MARK'], 'w').write(str(os.getpid())); time.sleep(600)"
    (tmp_path / "step.py").write_text(
        "import os, pathlib, subprocess, sys, time\n"
        "pathlib.Path(os.environ['SLIMLLM_RESULTS'], 'gram.jsonl').write_text('{}\\n')\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "time.sleep(600)"
    )
    (tmp_path / "run.py").write_text(
        f"import signal, sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        "import gpu, pathlib\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "gpu.Runner('bench', here / 'work', 60, here / 'out').run([gpu.Step('step', str(here / 'step.py'), 50)])"
    )
    for name in ("work", "out"):
        (tmp_path / name).mkdir()
    mark = tmp_path / "mark"
    running = subprocess.Popen([sys.executable, str(tmp_path / "run.py")], env={**os.environ, "MARK": str(mark)})
    while not (mark.exists() and mark.read_text()):
        time.sleep(0.02)
        assert running.poll() is None
    running.terminate()
    assert running.wait(30) == 1
    with tarfile.open(tmp_path / "out" / "gpu-bench.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    assert "interrupted" in (tmp_path / "gpu-bench" / "steps.jsonl").read_text()
    assert (tmp_path / "gpu-bench" / "results" / "gram.jsonl").read_text() == "{}\n"
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(int(mark.read_text()), 0)
            time.sleep(0.05)


def test_rows_of_an_archive(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpu-bench" / "results").mkdir(parents=True)
    (tmp_path / "gpu-bench" / "results" / "gram.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "gpu-bench" / "steps.jsonl").write_text("{}\n")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "gpu-bench", "gpu-bench")
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(gpu.keep_rows, "__defaults__", (tmp_path / "results",))
    gpu.keep(tmp_path / "a.tar.gz")
    assert {path.name: path.read_text() for path in (tmp_path / "results").iterdir()} == {"gram.jsonl": '{"a": 1}\n'}


def test_limits(gpu: Any) -> None:
    """Steps are real files, and their limits fit, one after another, into the minutes that a command may take."""
    for name, steps in gpu.STEPS.items():
        for step in steps:
            for arguments in (step.arguments, step.small or ""):
                assert all((ROOT / word).exists() for word in arguments.split() if word.startswith(("bench", "tests")))
        assert sum(step.limit_s for step in steps) <= gpu.MOST_S[name]
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
