"""report.json: a full record of a run, for people and programs. `prune` writes it; all displays of results read it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from slimllm.checkpoints.foreign_json import EVERY, POSITIVE, Shape, check_shape, read_object
from slimllm.config import METHODS
from slimllm.errors import InputError
from slimllm.pruning.layer_report import LAYER_SHAPE, LayerReport

REPORT_NAME = "report.json"
SCHEMA_VERSION = 2  # of report.json; slimllm 0.1 wrote version 1, without this key
_Report = TypeVar("_Report")


_NAMES = re.compile(r"[\w ,'()-]{1,80}")  # names of parts, which label pictures
_MOST_LAYERS, _MOST_HEADS = 2_000, 200_000  # the page draws them one by one

# Required shape of report.json when it is read: displays rely on it, and somebody may have edited the file.
_SHAPE = {
    "model": str,
    "out?": (str, type(None)),
    "config": {
        "ratio": float,
        "preset": str,
        "criterion": str,
        "allocation": str,
        "recovery": str,
        "seed": int,
        "head_unit?": str,
        "heads_multiple_of?": int,
        "round_to?": (int, type(None)),
        "method_settings?": {EVERY: dict},
        "method_needs?": {EVERY: [str]},
        **{name: (str, type(None)) for name in ("host_memory?", "gpu_memory?", "device?")},
    },
    "allocation": {"notes": [str]},
    "calibration": {
        "text": str,
        "bos?": str,
        "samples": int,
        "seq_len": int,
        "held_out?": int,
        "dense_windows?": int,
        "perplexity_tokens": int,
        "perplexity_dense": POSITIVE,
        "perplexity_pruned": POSITIVE,
    },
    "parameters": {"before": POSITIVE, "after": POSITIVE, "layers_before": POSITIVE, "layers_after": int},
    "achieved_ratio": float,
    "achieved_ratio_model": float,
    "elapsed_s": float,
    "setup_s": float,
    "dense_pass_s": POSITIVE,
    "stages_s": {EVERY: float},
    "peak_host_gib": float,
    "peak_gpu_gib": float,
    "memory_gib": {EVERY: float},
    "backend": str,
    "device": str,
    "compute_dtype": str,
    "format": str,
    "versions": {EVERY: str},
    "threads?": int,
    "layers": [LAYER_SHAPE],
    "tensor_parallel?": [int],
    "resumed_steps?": int,
    "identity?": dict,
    "dense_pass_shared?": bool,
    "dense_stage_s?": float,
    "schema_version": int,
    "gpu_memory_gib?": {EVERY: float},
    "operations?": {EVERY: str},
    "plan?": dict,
}


@dataclass
class PruneReport:
    """Record of a pruning run. The keys of report.json are the names of these fields.

    Attributes:
        model: Name of the model as it was given.
        out: The folder written, or None for a model in memory.
        config: The settings (`PruneConfig.to_dict`).
        allocation: target_params, pruned_layers (n), alpha, round_to and notes.
        calibration: text, bos (`with BOS`, `no BOS`, or `as given` of token ids), bos_token_id, samples, seq_len, tokens;
            held_out: number of further windows of the text, kept out of the statistics; dense_windows: number of samples
            on which the dense pass measured the layers; and the perplexity before and after (`perplexity_dense`,
            `perplexity_pruned`) on `perplexity_tokens` tokens: those held out or, if there are none, the first ones in
            the statistics.
        parameters: before, after (whole model), layers_before, layers_after (decoder layers).
        achieved_ratio: Fraction of the layers' parameters removed; `achieved_ratio_model` of the whole model.
        elapsed_s: Seconds from the first weight read to the finished folder.
        setup_s: Seconds before that, for opening the model and drawing the calibration windows.
        dense_pass_s: Computing time of one forward pass of the dense decoder layers over all tokens, in seconds. It is
            extrapolated if dense_windows is less than samples.
        stages_s: Seconds by stage.
        peak_host_gib, peak_gpu_gib: Peak memory of the run.
        memory_gib, gpu_memory_gib: Memory estimates of the two peaks, part by part, made before the run.
        identity: What another run must have in common with this one to count as the same run.
        dense_pass_shared: Whether another run's dense pass was used; its seconds are then not included in `elapsed_s`.
        dense_stage_s: Seconds of the whole dense pass, with reading and measuring (of its last part, if it was resumed).
        plan: Where tensors were stored, the settings chosen to fit the budgets, and the estimate of disk space.
        operations: What every operation of `slimllm.ops` has run on in the first process: torch, triton or extension.
        backend, device, compute_dtype, format: What computed, where, in which dtype, and the architecture written.
        versions: Versions of python, torch, triton (where it is installed), transformers, slimllm.
        threads: Threads of torch on the CPU, on which the last bits of a result depend; 0: not recorded.
        layers: One entry per layer, see `slimllm.pruning.layer_report.LayerReport`.
        tensor_parallel: Numbers of devices, from 2 on, over which tensor parallelism can split every layer; see
            `slimllm.pruning.tensor_parallel`.
        schema_version: Version of the keys and their meaning; it grows when one of them changes.
        resumed_steps: Layers, of both passes, that were done before the run was interrupted and resumed. Seconds cover
            all parts of the run.
    """

    model: str
    out: str | None
    config: dict[str, Any]
    allocation: dict[str, Any]
    calibration: dict[str, Any]
    parameters: dict[str, int]
    achieved_ratio: float
    achieved_ratio_model: float
    elapsed_s: float
    setup_s: float
    dense_pass_s: float
    stages_s: dict[str, float]
    peak_host_gib: float
    peak_gpu_gib: float
    memory_gib: dict[str, float]
    backend: str
    device: str
    compute_dtype: str
    format: str
    versions: dict[str, str]
    layers: list[LayerReport] = field(default_factory=list)
    tensor_parallel: list[int] = field(default_factory=list)
    resumed_steps: int = 0
    threads: int = 0
    schema_version: int = SCHEMA_VERSION
    identity: dict[str, Any] = field(default_factory=dict)
    dense_pass_shared: bool = False
    dense_stage_s: float = 0.0
    gpu_memory_gib: dict[str, float] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    operations: dict[str, str] = field(default_factory=dict)

    @property
    def seconds_alone(self) -> float:
        """Seconds of pruning as a single run: with the dense pass, even if it was taken from another run."""
        if not self.dense_pass_shared:
            return self.elapsed_s
        return self.elapsed_s + (self.dense_stage_s if self._measured else self.dense_pass_s)

    @property
    def methods(self) -> str:
        """The methods of the run in words, with the options that differ from their defaults."""
        words = []
        for kind, registry in METHODS.items():
            settings = (self.config.get("method_settings") or {}).get(kind) or {}
            # None: the plug-in is not available here, and all of its options are shown.
            method = registry.all().get(self.config[kind])
            usual = dataclasses.asdict(method.Settings()) if method else {}
            shown = [
                f"{name} {str(value).lower()}" for name, value in settings.items() if (name, value) not in usual.items()
            ]
            options = f" ({', '.join(shown)})" if shown else ""
            words.append(f"{kind} {self.config[kind]}{options}")
        return ", ".join(words)

    @property
    def _measured(self) -> bool:
        """Whether statistics of the dense model were measured."""
        if "method_needs" in self.config:
            return bool(self.config["method_needs"]["allocation"] or self.config.get("one_pass"))
        return self.config["allocation"] in ("auto", "flap")  # a report of version 0.1

    @property
    def judged_by(self) -> str:
        """The tokens on which the perplexity was measured, in words."""
        tokens = self.calibration["perplexity_tokens"]
        if self.calibration.get("held_out"):
            return f"{tokens:,} held-out tokens of the calibration text"
        return f"{tokens:,} calibration tokens that it is fitted to"

    def save(self, folder: Path) -> None:
        """Write report.json into the folder."""
        text = json.dumps(_rounded(dataclasses.asdict(self)), indent=1, allow_nan=False)
        (folder / REPORT_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> PruneReport:
        """Read the report of a pruned checkpoint.

        Raises:
            ValueError: (as InputError) the folder holds no report.json, or one that `prune` did not write.
        """
        path = Path(folder) / REPORT_NAME
        report = read_report(cls, path, "a pruning run", _SHAPE)
        if fault := report._fault():
            raise InputError(f"{path} is not the report of a pruning run: {fault}.")
        report.calibration.setdefault("bos", "BOS not recorded")  # what reports of earlier versions may lack
        for name in ("host_memory", "gpu_memory", "device"):
            report.config.setdefault(name, None)
        return report

    def _fault(self) -> str | None:
        """Describe an inconsistency that would make a display fail; None: there is none."""
        if not 1 <= len(self.layers) <= _MOST_LAYERS:
            return f"it has {len(self.layers) or 'no'} layers"
        if (heads := sum(layer.get("num_heads_before", 1) for layer in self.layers)) > _MOST_HEADS:
            return f"its layers have {heads} heads"
        for index, layer in enumerate(self.layers):
            channels = layer.get("intermediate_size_before")
            if layer["index"] != index:
                return f"layer {index} has the index {layer['index']}"
            before = [f"{name}_before" in layer for name in ("num_heads", "num_kv_heads", "intermediate_size")]
            if any(before) and not all(before):
                return f"layer {index} lacks some of its sizes before pruning"
            if 0 in (layer.get("num_heads_before"), channels):
                return f"layer {index} had no heads or no channels before pruning"
            if channels and any(channel >= channels for channel in layer.get("kept_channels", [])):
                return f"layer {index} has kept a channel that it does not have"
            if channels and len(layer.get("channel_importance") or []) not in (0, channels):
                return f"layer {index} does not have as many importances as channels"
            for part in ("attention", "ffn"):
                if (f"{part}_error_before" in layer) != (f"{part}_error_after" in layer):
                    return f"layer {index} has only one error of its {part}"
        names = [*self.stages_s, *self.memory_gib, *self.gpu_memory_gib]
        return next((f"{name[:40]!r} is not a name of a part" for name in names if not _NAMES.fullmatch(name)), None)


def read_report(kind: type[_Report], path: Path, of_what: str, shape: Shape) -> _Report:
    """Read a report from a JSON file whose keys are the report's fields and whose values have a shape (`check_shape`).

    Raises:
        ValueError: (as InputError) there is no such file, or it is not such a report.
    """
    if not path.is_file():
        raise InputError(f"There is no {path}; give the folder that {of_what} has written.")
    content = read_object(path)
    if "schema_version" in kind.__dataclass_fields__:  # type: ignore[attr-defined]
        version = content.setdefault("schema_version", 1)
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise InputError(
                f"{path} is not the report of {of_what}, or is of a later version of slimllm; update this one."
            )
    try:
        check_shape(content, shape, "")
        return kind(**content)
    except TypeError:
        raise InputError(f"{path} is not the report of {of_what}, or is that of another version of slimllm.") from None
    except InputError as error:
        raise InputError(f"{path} is not the report of {of_what}: {error}") from None


def versions() -> dict[str, str]:
    """Return the versions that a result may depend on."""
    import transformers

    found = {
        "slimllm": importlib.metadata.version("slimllm-engine"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    try:
        found["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        pass  # not on every platform
    return found


def _rounded(value: Any) -> Any:
    """Round floats to 7 digits, which is as precise as the numbers are, at a third of the size."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value
