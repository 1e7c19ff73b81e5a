"""All checks, or all benchmarks, of a GPU in one command: for a machine that is there for minutes.

    python benchmarks/gpu.py check    build with CUDA, doctor, tests, parity; within 4 minutes   (make gpu-check)
    python benchmarks/gpu.py bench    the most telling figures first; within 10 minutes          (make gpu-bench)
    … --dry-run                       the same steps at small sizes, as on a simulated GPU
    … --list                          the steps and their limits

Every step has a limit, and a failure does not stop the later steps. Rows of results are appended to benchmarks/results/. If
the environment variable OUT names a folder, an archive in it has the logs of all steps, steps.jsonl with their seconds and
exit status, and the rows that were measured here; it is written again after every step. Nothing is left in the temporary
folder.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
STORIES = "slimllm/calibration/data/stories260k"
MOST_S = {"check": 230, "bench": 570}  # of all steps
SLOWER = 10  # is a simulated GPU
GRACE_S = 10  # from the interrupt to the end
TESTS = ("kernels", "columns", "pearson", "greedy_elimination", "ops", "lstsq")


@dataclass(frozen=True)
class Step:
    """A command of this Python: its name, its arguments, its limit, and the arguments that replace some in a dry run."""

    name: str
    arguments: str
    limit_s: int
    small: str | None = None

    def command(self, dry_run: bool) -> list[str]:
        return [sys.executable, *(self.small if dry_run and self.small is not None else self.arguments).split()]


def _pytest(paths: str) -> str:
    return f"-m pytest -p no:cacheprovider -n {min(8, os.cpu_count() or 1)} --durations 5 {paths}"


def _bench(name: str, arguments: str, limit_s: int, small: str) -> Step:
    script = f"benchmarks/bench_{name.partition(' ')[0]}.py"
    return Step(name, f"{script} {arguments}", limit_s, f"{script} {small}")


STEPS: dict[str, list[Step]] = {
    "check": [
        Step("build", "-m pip install -v --no-build-isolation --no-deps -e .", 150, "-m pip --version"),
        Step("doctor", "-m slimllm doctor", 60),
        Step("gpu tests", _pytest("-m gpu tests/gpu"), 100, _pytest("-m gpu tests/gpu -k least_squares")),
        Step("parity", _pytest("tests/integration/test_parity.py"), 60, _pytest("tests/integration/test_parity.py -k mha")),
        Step(
            "operations",
            _pytest(" ".join(f"tests/unit/ops/test_{name}.py" for name in TESTS) + " tests/unit/statistics"),
            100,
            _pytest("tests/unit/ops/test_lstsq.py"),
        ),
    ],
    "bench": [
        _bench("gram 7B", "--shapes llama-7b", 45, "--shapes smollm2-135m --tokens 64 --rounds 1"),
        _bench("pearson 7B", "--shapes llama-7b", 45, "--shapes smollm2-135m --tokens 32 --rounds 1"),
        _bench("prune 7B", "--large paper default", 90, f"{STORIES} --large paper default"),
        _bench("large 33B", "--layers 4 --gpu-memory 8GiB", 110, "--model smollm2-135m --layers 1 --samples 1"),
        _bench("prune 7B, least squares", "--large lstsq best", 110, f"{STORIES} --large lstsq best"),
        _bench("lstsq", "", 45, "--rounds 1 --most 64"),
        Step("tune", "benchmarks/tune_gram.py", 75, "benchmarks/tune_gram.py --features 64 --tokens 32 --rounds 1"),
        _bench("gram", "--shapes llama-13b llama-33b llama-2-70b", 60, "--shapes smollm2-135m --tokens 32 --rounds 1"),
        _bench("pearson", "--shapes llama-13b llama-33b llama-2-70b", 60, "--shapes smollm2-135m --tokens 32 --rounds 1"),
    ],
}


class Runner:
    """Runs steps within a number of seconds, and keeps their logs and rows in `folder`."""

    def __init__(self, name: str, folder: Path, seconds: float, out: Path | None) -> None:
        self.name, self.folder, self.out = name, folder, out
        self.console = Console()
        self._until = time.monotonic() + seconds
        (folder / "results").mkdir()
        (folder / "tmp").mkdir()
        self.environment = os.environ | {
            "SLIMLLM_BUILD_EXT": "1",
            "SLIMLLM_RESULTS": str(folder / "results"),
            "TMPDIR": str(folder / "tmp"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }

    def run(self, steps: list[Step], dry_run: bool = False) -> bool:
        """Run the steps; return whether all have succeeded."""
        good = True
        for number, step in enumerate(steps, 1):
            limit = min(step.limit_s * (SLOWER if dry_run else 1), self._until - time.monotonic() - GRACE_S)
            if limit < 5:
                status, seconds = "no time left", 0.0
            else:
                status, seconds = self._call(step.command(dry_run), self.folder / f"{number}-{step.name}.log", limit)
            good = good and status == "done"
            row = {"step": step.name, "status": status, "seconds": round(seconds, 1), "command": step.command(dry_run)[1:]}
            with (self.folder / "steps.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            self.console.print(f"{seconds:6.1f} s  {step.name}: {status}", highlight=False)
            self._pack()
        return good

    def _call(self, command: list[str], log: Path, limit: float) -> tuple[str, float]:
        started = time.monotonic()
        with log.open("w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(limit)
                status = "done" if code == 0 else f"failed with exit status {code}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGINT)  # so that it says where it was, and removes its files
                status = f"stopped after {limit:.0f} s"
                try:
                    process.wait(GRACE_S)
                except subprocess.TimeoutExpired:
                    pass
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if status != "done":
            self.console.print(log.read_text(errors="replace")[-3000:], markup=False, highlight=False)
        return status, time.monotonic() - started

    def _pack(self) -> None:
        """Write the archive anew, beside its place, so that a run that is cut off leaves the last whole one."""
        if self.out is None:
            return
        part = self.out / f"gpu-{self.name}.part"
        with tarfile.open(part, "w:gz") as archive:
            archive.add(self.folder, f"gpu-{self.name}", filter=lambda one: None if "/tmp" in one.name else one)
        part.replace(self.out / f"gpu-{self.name}.tar.gz")


def keep_rows(measured: Path, results: Path = RESULTS) -> None:
    """Append the rows that were measured to those of the repository."""
    for path in sorted(measured.glob("*.jsonl")):
        with (results / path.name).open("a") as file:
            file.write(path.read_text())


def main() -> None:
    """Run the steps; the exit status is 1 if one of them has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=sorted(STEPS))
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    steps = STEPS[arguments.what]
    if arguments.list:
        for step in steps:
            print(f"{step.limit_s:4} s  {step.name}: python {step.arguments}")
        return
    out = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    if out is not None and not out.is_dir():
        parser.error(f"OUT names {out}, which is not a folder; make it first.")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="slimllm-gpu-", ignore_cleanup_errors=True) as folder:
        seconds = MOST_S[arguments.what] * (SLOWER if arguments.dry_run else 1)
        good = Runner(arguments.what, Path(folder), seconds, out).run(steps, arguments.dry_run)
        if not arguments.dry_run:
            keep_rows(Path(folder) / "results")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
