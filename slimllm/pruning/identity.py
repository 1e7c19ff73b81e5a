"""Identity of a run: what another run must have in common with it to resume it or to share its work."""

from __future__ import annotations

import json
import logging
import zlib
from typing import Any

import torch

from slimllm import ops
from slimllm.calibration import Calibration
from slimllm.checkpoints.journal import Journal, fingerprint
from slimllm.checkpoints.source import CheckpointModel, ModelSource
from slimllm.config import METHODS, PruneConfig
from slimllm.errors import InputError
from slimllm.pruning.memory_estimate import batch_windows
from slimllm.pruning.plan import ROUNDINGS, Plan
from slimllm.pruning.report import versions
from slimllm.runtime.distributed import Ranks

_log = logging.getLogger("slimllm")

WEIGHTS = "weights, by checksum"


def identity_of(source: CheckpointModel, calibration: Calibration, plan: Plan) -> dict[str, Any]:
    """Return what two runs must have in common for one to resume the other; weights are compared layer by layer."""
    others = [fingerprint(source.checkpoint.read([name])) for name in source.other_tensors()]
    return {
        **identity_in_memory(source, calibration, plan.config),
        **{name: getattr(plan.placement, name) for name in ROUNDINGS if name != "systems" or plan.placement.solves_on_host},
        "embeddings, by checksum": zlib.crc32(str(others).encode()),
    }


def identity_in_memory(source: ModelSource, calibration: Calibration, config: PruneConfig) -> dict[str, Any]:
    """Return the identity of a run without the weights and the placement."""
    settings, token_ids = config.to_dict(), calibration.token_ids
    for name in ("calibration", "device", "host_memory", "gpu_memory"):
        del settings[name]
    settings["samples"] = len(token_ids)
    settings["batch_size"] = batch_windows(len(token_ids), token_ids.shape[1], config.batch_size)
    model = source.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        model.pop(name, None)
    description = json.dumps([model, source.shapes()], sort_keys=True, default=str)
    return {
        "slimllm": versions()["slimllm"],
        **settings,
        "code of the methods": [getattr(config, kind).code() for kind in METHODS],
        "compute_dtype": str(source.dtype).removeprefix("torch."),
        "calibration text, by checksum": fingerprint({"": token_ids}),
        "held-out text, by checksum": fingerprint({"": calibration.held_out}),
        "model, by checksum": zlib.crc32(description.encode()),
    }


def checksum_of(checksums: list[int]) -> int:
    """Combine the checksums of the layers into the checksum of all weights."""
    return zlib.crc32(str(checksums).encode())


def compare_identities(identity: dict[str, Any], ranks: Ranks) -> None:
    """Check that all ranks have the same run.

    Raises:
        ValueError: (as InputError) a rank has a different one.
    """
    identities = ranks.everyone(identity)
    with ranks.together():
        for rank, other in enumerate(identities):
            for key, value in identities[0].items():
                if other[key] != value:
                    raise InputError(
                        f"Rank {rank} has another {key} ({other[key]}) than rank 0 ({value}); give all ranks the same."
                    )


def environment_of(device: torch.device, num_ranks: int) -> dict[str, Any]:
    """Return the properties of the environment on which the last digits of a result may depend."""
    cuda = device.type == "cuda"
    return {
        **{name: version for name, version in versions().items() if name in ("torch", "transformers", "triton")},
        "device": torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "ranks": num_ranks,
        "backend": ops.backend(device),
    }


def say_changes(journal: Journal, device: torch.device, num_ranks: int) -> None:
    """Warn if a resumed run was begun in another environment."""
    now = environment_of(device, num_ranks)
    begun = {key: value for key, value in journal.environment.items() if key in now}
    if changed := [f"{key} {value}" for key, value in begun.items() if value != now[key]]:
        _log.warning("The run was begun with %s; the last digits of the result may depend on that.", ", ".join(changed))
