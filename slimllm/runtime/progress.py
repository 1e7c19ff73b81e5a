"""Progress events of long work, for a callback. Notices go to the logger `slimllm` instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """One more part of long work is complete.

    Attributes:
        done: Number of complete parts, this one included.
        total: Number of parts.
    """

    done: int
    total: int


@dataclass(frozen=True)
class LayerMeasured(Progress):
    """The dense pass has measured a layer."""


@dataclass(frozen=True)
class LayerPruned(Progress):
    """A layer is pruned.

    Attributes:
        layer: Its entry in report.json, see `slimllm.pruning.layer_report.LayerReport`.
    """

    layer: Mapping[str, Any]


@dataclass(frozen=True)
class StepTrained(Progress):
    """A training step is done.

    Attributes:
        loss: Mean loss of its examples.
    """

    loss: float


@dataclass(frozen=True)
class PartWritten(Progress):
    """A layer, or a tensor of a GGUF file, is written."""


# Called after every part. An exception raised in it stops the work there.
ProgressCallback = Callable[[Progress], None]
