"""All checks, or all benchmarks, of a GPU in one command: for a machine that is there for minutes.

    python benchmarks/gpu.py check    build with CUDA, kernels, tests, parity; within 4 minutes  (make gpu-check)
    python benchmarks/gpu.py bench    the most telling figures first; within 10 minutes          (make gpu-bench)
    … --seconds 300                   less time
    … --dry-run                       the same steps at small sizes, as on a simulated GPU
    … --list                          the steps and their limits
    python benchmarks/gpu.py kernels  fail unless every operation uses its kernel, compared with torch, on the GPU
    python benchmarks/gpu.py keep ARCHIVE   append the rows of an archive to benchmarks/results/

Every step has a limit, and a failure does not stop the later steps. If the environment variable OUT names a folder, an
archive in it has the logs of all steps, steps.jsonl with their seconds and exit status, and the rows that were measured. It
is written again every few seconds, so that a machine that is taken away leaves what was done. Otherwise the rows are
appended to benchmarks/results/. Nothing is left in the temporary folder.
"""

from __future__ import annotations

import argparse
import contextlib
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

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
STORIES = "slimllm/calibration/data/stories260k"
SMALL = "--model smollm2-135m"
MOST_S = {"check": 230, "bench": 575}  # of all steps
SLOWER = 10  # is a simulated GPU
GRACE_S = 10  # from the interrupt to the end
PACK_S = 15  # between two archives
TESTS = ("kernels", "columns", "pearson", "greedy_elimination", "substitution", "cholesky", "ops", "lstsq")


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


# The extension is built if it is possible; whether its CUDA part was is for `kernels` to say.
BUILD = "-m pip install -v --no-build-isolation --no-deps -e ."
STEPS: dict[str, list[Step]] = {
    "check": [
        Step("build", BUILD, 80, "setup.py build_ext --build-lib build/dry --build-temp build/dry"),
        Step("kernels", "benchmarks/gpu.py kernels", 40),
        Step("gpu tests", _pytest("-m gpu tests/gpu"), 40, _pytest("-m gpu tests/gpu -k least_squares")),
        Step(
            "operations",
            _pytest(" ".join(f"tests/unit/ops/test_{name}.py" for name in TESTS) + " tests/unit/statistics"),
            40,
            _pytest("tests/unit/ops/test_lstsq.py"),
        ),
        Step("parity", _pytest("tests/integration/test_parity.py"), 30, _pytest("tests/integration/test_parity.py -k mha")),
    ],
    "bench": [
        Step("build", BUILD, 60, "setup.py build_ext --build-lib build/dry --build-temp build/dry"),
        _bench("gram 7B", "--shapes llama-7b", 35, "--shapes smollm2-135m --tokens 64 --rounds 1"),
        _bench("pearson 7B", "--shapes llama-7b", 35, "--shapes smollm2-135m --tokens 32 --rounds 1"),
        _bench("prune 7B", "--large paper slimllm", 80, f"{STORIES} --large paper slimllm"),
        _bench("large 33B", "--layers 4", 90, f"{SMALL} --layers 1 --samples 1"),
        _bench("prune 7B, least squares", "--large lstsq best", 90, f"{STORIES} --large lstsq best"),
        _bench("lstsq", "", 35, "--rounds 1 --most 64"),
        Step("tune", "benchmarks/tune_gram.py", 60, "benchmarks/tune_gram.py --features 64 --tokens 32 --rounds 1"),
        _bench("gram", "--shapes llama-13b llama-33b llama-2-70b", 40, "--shapes smollm2-135m --tokens 32 --rounds 1"),
        _bench("pearson", "--shapes llama-13b llama-33b llama-2-70b", 40, "--shapes smollm2-135m --tokens 32 --rounds 1"),
    ],
}


class Runner:
    """Runs steps within a number of seconds, and keeps their logs and rows in `folder`."""

    def __init__(self, name: str, folder: Path, seconds: float, out: Path | None) -> None:
        self.name, self.folder, self.out = name, folder, out
        self._until = time.monotonic() + seconds
        (folder / "results").mkdir()
        (folder / "tmp").mkdir()
        self.environment = os.environ | {
            "SLIMLLM_RESULTS": str(folder / "results"),
            "TMPDIR": str(folder / "tmp"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }

    def run(self, steps: list[Step], dry_run: bool = False) -> bool:
        """Run the steps; return whether all have succeeded."""
        good = True
        for number, step in enumerate(steps, 1):
            log = self.folder / f"{number}-{step.name}.log"
            limit = min(step.limit_s * (SLOWER if dry_run else 1), self._until - time.monotonic() - GRACE_S)
            started, status = time.monotonic(), "interrupted"
            try:
                status = self._call(step.command(dry_run), log, limit) if limit >= 5 else "no time left"
            finally:
                seconds = round(time.monotonic() - started, 1)
                row = {"step": step.name, "status": status, "seconds": seconds, "command": step.command(dry_run)[1:]}
                with (self.folder / "steps.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{seconds:6.1f} s  {step.name}: {status}", flush=True)
                self._pack()
            good = good and status == "done"
        return good

    def _call(self, command: list[str], log: Path, limit: float) -> str:
        until = time.monotonic() + limit
        with log.open("w") as file:
            # A group of its own, so that all that it starts can be ended.
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=file, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp
            )
            try:
                status = self._wait(process, until)
                if status is None:
                    os.killpg(process.pid, signal.SIGINT)  # so that it says where it was, and removes its files
                    self._wait(process, time.monotonic() + GRACE_S)
                    status = f"stopped after {limit:.0f} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status != "done":
            print(log.read_text(errors="replace")[-3000:], flush=True)
        return status

    def _wait(self, process: subprocess.Popen[bytes], until: float) -> str | None:
        """Return how a process ended; None if it is still at work at that time. Archives are written meanwhile."""
        while (left := until - time.monotonic()) > 0:
            try:
                code = process.wait(min(left, PACK_S))
                return "done" if code == 0 else f"failed with exit status {code}"
            except subprocess.TimeoutExpired:
                self._pack()
        return None

    def _pack(self) -> None:
        """Write the archive anew, beside its place, so that a run that is cut off leaves the last whole one."""
        if self.out is None:
            return
        part = self.out / f"gpu-{self.name}.part"
        with tarfile.open(part, "w:gz") as archive:
            archive.add(self.folder, f"gpu-{self.name}", filter=lambda one: None if "/tmp" in one.name else one)
        part.replace(self.out / f"gpu-{self.name}.tar.gz")


def keep_rows(measured: Path, results: Path = RESULTS) -> None:
    """Append the rows in a folder to those of the repository."""
    for path in sorted(measured.glob("*.jsonl")):
        with (results / path.name).open("a") as file:
            file.write(path.read_text())


def keep(path: Path) -> None:
    """Append the rows of an archive to those of the repository."""
    with tempfile.TemporaryDirectory() as folder, tarfile.open(path) as archive:
        for member in archive.getmembers():
            if member.isfile() and Path(member.name).parent.name == "results":
                content = archive.extractfile(member)
                assert content is not None
                (Path(folder) / Path(member.name).name).write_bytes(content.read())
        keep_rows(Path(folder))


def check_kernels() -> bool:
    """Print what every operation uses on the GPU; return whether none that has a kernel falls back to torch."""
    from slimllm.ops.registry import OPERATIONS
    from slimllm.runtime.doctor import diagnose

    found = diagnose()
    print(found.extension)
    with_kernel = {name for name, known in OPERATIONS.items() if known.kernel or "cuda" in known.extension}
    on_gpu = [row for row in found.operations if row[1] != "cpu" and row[0] in with_kernel]
    for operation, device, backend, reason in on_gpu:
        print(f"{operation} on {device}: {backend} ({reason})")
    if "simulated_cuda" in sys.modules:  # beside an extension for CPUs
        on_gpu = [row for row in on_gpu if "was built without CUDA" not in row[3]]
    return bool(on_gpu) and all(row[2] in ("triton", "extension") for row in on_gpu)


def without_gpu() -> str:
    """Return why there is nothing to check or to measure, or an empty string."""
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch; use the Python of an environment for the GPU (PYTHON=… for make)"
    if torch.cuda.is_available():
        return ""
    return f"torch {torch.__version__} {'sees no GPU' if torch.version.cuda else 'is built for CPUs'}"


def main() -> None:
    """Run the steps; the exit status is 1 if one of them has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*STEPS, "kernels", "keep"])
    parser.add_argument("archive", type=Path, nargs="?")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    if arguments.what == "keep":
        if arguments.archive is None:
            parser.error("keep takes the archive that check or bench has written.")
        keep(arguments.archive)
        return
    if arguments.list:
        for step in STEPS.get(arguments.what, []):
            print(f"{step.limit_s:4} s  {step.name}: python {step.arguments}")
        return
    if reason := without_gpu():
        sys.exit(f"There is no GPU: {reason}.")
    if arguments.what == "kernels":
        sys.exit(0 if check_kernels() else "Not every operation with a kernel uses it.")
    steps = STEPS[arguments.what]
    out = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    if out is not None and not out.is_dir():
        parser.error(f"OUT names {out}, which is not a folder; make it first.")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="slimllm-gpu-", ignore_cleanup_errors=True) as folder:
        seconds = arguments.seconds or MOST_S[arguments.what] * (SLOWER if arguments.dry_run else 1)
        try:
            good = Runner(arguments.what, Path(folder), seconds, out).run(steps, arguments.dry_run)
        finally:
            if out is None and not arguments.dry_run:
                keep_rows(Path(folder) / "results")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
