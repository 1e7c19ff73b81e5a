"""Measured runs, each in its own process and returned as a row of numbers. Called by `slimllm bench` and benchmarks/."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import platform
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from slimllm.checkpoints.base import Checkpoint
from slimllm.checkpoints.opening import open_checkpoint
from slimllm.checkpoints.source import CheckpointModel
from slimllm.checks import parse_bytes, parse_device, torch_dtype
from slimllm.config import METHODS, PruneConfig
from slimllm.errors import InputError
from slimllm.experiments.bench.shapes import SHAPES
from slimllm.experiments.bench.synthetic import FirstLayers, RandomCheckpoint
from slimllm.experiments.bench.work import measure_rates, stage_work
from slimllm.models.families import family_of, head_dim_of
from slimllm.plugins import import_plugin
from slimllm.presets import DEFAULT
from slimllm.pruning.api import prune
from slimllm.runtime.interrupts import leave_interrupts_to_parent

_COPIED = (
    "elapsed_s",
    "dense_pass_s",
    "stages_s",
    "peak_host_gib",
    "peak_gpu_gib",
    "memory_gib",
    "gpu_memory_gib",
    "plan",
    "parameters",
    "achieved_ratio",
    "backend",
    "device",
    "compute_dtype",
    "versions",
)


@dataclass(frozen=True)
class Setting:
    """Settings of a measured run.

    Attributes:
        model: A Hugging Face folder, a GGUF file, a hub id, or the name of a shape (see `SHAPES`).
        layers: Number of decoder layers, from the first on; None: all.
        ratio, preset, recovery, criterion, allocation: As in `PruneConfig`, names or methods.
        samples, seq_len, device, compute_dtype, host_memory, gpu_memory: As in `PruneConfig`.
        plugins: Modules or files with methods, see `slimllm.plugins.import_plugin`.
        on_disk: Write the weights of a named shape to disk before the run, and read them from there. Otherwise they are
            generated when they are read, which takes about as long as reading.
        seed: Seed of random weights and of the calibration.
    """

    model: str
    layers: int | None = None
    ratio: float = 0.2
    preset: str = DEFAULT
    recovery: Any = None
    criterion: Any = None
    allocation: Any = None
    plugins: tuple[str, ...] = ()
    samples: int = 32
    seq_len: int = 128
    device: str | None = None
    compute_dtype: str | None = None
    host_memory: str | None = None
    gpu_memory: str | None = None
    on_disk: bool = False
    seed: int = 0


def measure(setting: Setting, workdir: str | Path | None = None) -> dict[str, Any]:
    """Prune once in a new process, so that memory and caches of other runs do not count.

    Args:
        setting: The run to measure.
        workdir: Folder for the pruned model and for weights on disk, which are deleted afterwards; None: the system's
            temporary folder.

    Returns:
        The setting; total seconds, seconds by stage and of one dense pass; tokens, layers and parameters per second; peak
        memory; time divided by that of the dense pass; the lower bound by stage, and time divided by it; device, versions.

    Raises:
        ValueError: (as InputError) a setting is wrong.
    """
    check_setting(setting)
    workdir = None if workdir is None else Path(workdir)
    if workdir is not None and not workdir.is_dir():
        raise InputError(f"The working folder {workdir} does not exist; make it first.")
    others = multiprocessing.active_children()  # the caller's own processes
    # The folder is made and removed here, since the other process may be killed.
    with tempfile.TemporaryDirectory(prefix="slimllm-bench-", dir=workdir) as folder:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(1, context, initializer=_begin, initargs=(setting.plugins,))
        try:
            return pool.submit(_run, setting, Path(folder)).result()
        except BrokenProcessPool:
            raise InputError(
                f"The process that pruned {setting.model} was killed, probably because memory ran out; use fewer layers "
                "or tokens."
            ) from None
        finally:
            for child in multiprocessing.active_children():
                if child not in others:
                    child.terminate()
            pool.shutdown()


def _begin(plugins: tuple[str, ...]) -> None:
    """Import plug-ins in the new process before it receives a setting, which may contain their methods."""
    leave_interrupts_to_parent()
    for plugin in plugins:
        import_plugin(plugin)


def check_setting(setting: Setting) -> None:
    """Check whether a setting can be measured, as far as possible without opening the model.

    Raises:
        ValueError: (as InputError) a field is out of range.
    """
    for plugin in setting.plugins:
        import_plugin(plugin)
    _config(setting, None)
    shape = SHAPES.get(setting.model)
    if setting.layers is not None and setting.layers < 1:
        raise InputError(f"layers must be at least 1, got {setting.layers}.")
    if shape and setting.layers is not None and setting.layers > shape.num_layers:
        raise InputError(f"layers must be from 1 to {shape.num_layers}, got {setting.layers}.")
    if shape is None and setting.on_disk:
        raise InputError(f"on_disk is only for shapes, whose weights are random; {setting.model} is on disk already.")


def _config(setting: Setting, calibration: torch.Tensor | None) -> PruneConfig:
    return PruneConfig(
        ratio=setting.ratio,
        preset=setting.preset,
        recovery=setting.recovery,
        criterion=setting.criterion,
        allocation=setting.allocation,
        calibration=calibration,
        samples=setting.samples,
        seq_len=setting.seq_len,
        seed=setting.seed,
        device=setting.device,
        compute_dtype=setting.compute_dtype,
        host_memory=setting.host_memory,
        gpu_memory=setting.gpu_memory,
    )


def _run(setting: Setting, folder: Path) -> dict[str, Any]:
    checkpoint = _checkpoint(setting, folder)
    load = os.getloadavg()[0]
    calibration = None
    if setting.model in SHAPES:
        generator = torch.Generator().manual_seed(setting.seed)
        windows = (setting.samples, setting.seq_len)
        calibration = torch.randint(checkpoint.config.vocab_size, windows, generator=generator)
    if family_of(checkpoint.config.model_type).expert:
        raise InputError("bench counts the work of dense models; it does not measure mixtures of experts.")
    device = parse_device(setting.device)
    if setting.gpu_memory and device.type == "cuda":  # enforce the budget
        whole = torch.cuda.get_device_properties(device).total_memory
        budget = parse_bytes("gpu_memory", setting.gpu_memory)
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / whole), device.index)
    report = dataclasses.asdict(prune(checkpoint, folder / "out", _config(setting, calibration)))
    dtype = torch_dtype(report["compute_dtype"])
    sizes = CheckpointModel(checkpoint, device, dtype).sizes()
    gguf = checkpoint.path.is_file()
    read_bytes = checkpoint.path.stat().st_size / report["parameters"]["before"] if gguf else 2.0
    work = stage_work(report, sizes, checkpoint.config.hidden_size, head_dim_of(checkpoint.config), read_bytes)
    rates = measure_rates(device, dtype)
    floors = {stage: rates.floor_s(needed) for stage, needed in work.items()}
    seconds, floor = report["elapsed_s"], sum(floors.values())
    return {
        "model": checkpoint.name,
        **{name: value for name, value in vars(setting).items() if name not in ("model", "device")},
        **{name: report["config"][name] for name in METHODS},
        "method_settings": report["config"]["method_settings"],
        "weights": ("safetensors" if setting.on_disk else "generated") if setting.model in SHAPES else _kind(checkpoint),
        "num_layers": len(report["layers"]),
        "load": load,
        "threads": torch.get_num_threads(),
        **{name: report[name] for name in _COPIED},
        "layer_s": [layer["elapsed_s"] for layer in report["layers"]],
        "ratio_to_dense_pass": seconds / report["dense_pass_s"],
        "tokens_per_s": report["calibration"]["tokens"] / seconds,
        "layers_per_s": len(report["layers"]) / seconds,
        "parameters_per_s": report["parameters"]["layers_before"] / seconds,
        "floors_s": floors,
        "floor_s": floor,
        "times_floor": seconds / floor,
        "rates": dataclasses.asdict(rates),
    }


def _kind(checkpoint: Checkpoint) -> str:
    return "GGUF" if checkpoint.path.is_file() else "safetensors"


def _checkpoint(setting: Setting, folder: Path) -> Checkpoint:
    if setting.model in SHAPES:
        made = RandomCheckpoint(SHAPES[setting.model], setting.layers, setting.seed)
        if not setting.on_disk:
            return made
        made.write(folder / made.name)
        return open_checkpoint(folder / made.name)
    try:
        whole = open_checkpoint(setting.model)
    except InputError as error:
        raise InputError(f"{error} The names of shapes are {', '.join(SHAPES)}.") from None
    return whole if setting.layers is None else FirstLayers(whole, setting.layers)


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to a JSONL file, each with the date, the commit, the machine and the version of torch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"date": date.today().isoformat(), "commit": _commit(), "torch": torch.__version__}
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**about, "machine": machine(row.get("device")), **row}) + "\n")


def check_results_file(path: Path) -> None:
    """Check that rows can be appended to a file.

    Raises:
        ValueError: (as InputError) the path is a folder, or cannot be written.
    """
    existing = next(folder for folder in [path, *path.absolute().parents] if folder.exists())
    if path.is_dir() or (existing != path and not existing.is_dir()) or not os.access(existing, os.W_OK):
        raise InputError(f"The results file {path} cannot be written; give another one.")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSONL file.

    Raises:
        ValueError: (as InputError) there is no such file, or a line is not a JSON object.
    """
    if not path.is_file():
        raise InputError(f"There is no file {path}; give one written by slimllm bench.")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            raise InputError(
                f"Line {number} of {path} is not a row of results; give a file written by slimllm bench."
            ) from None
    return rows


def _commit() -> str:
    """Return the measured commit, or "" outside a checkout; changes to results and documents do not make it dirty."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return ""
    command = [
        "git",
        "status",
        "--porcelain",
        "--untracked-files=no",
        "--",
        ".",
        ":!benchmarks/results",
        ":!*.md",
        ":!benchmarks/*.png",
    ]
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=root)
        changes = subprocess.run(command, capture_output=True, text=True, cwd=root)
    except OSError:
        return ""
    return done.stdout.strip() + ("-dirty" if changes.stdout.strip() else "")


def machine(device: str | None = None) -> str:
    """Return the name of the GPU, or of the processor if there is no GPU or `device` is cpu."""
    if torch.cuda.is_available() and device != "cpu":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names) or '?'} cores of {names[0] if names else platform.processor()}"
