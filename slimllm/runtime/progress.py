"""Progress events of long work, for a callback. Notices go to the logger `slimllm` instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Progress:
    """One more part of long work is complete. As a string it is a line such as `pruning: 3 of 32`.

    Attributes:
        done: Number of complete parts, this one included.
        total: Number of parts.
        work: What the parts are of, in a word.
    """

    done: int
    total: int
    work: ClassVar[str] = "working"

    def __str__(self) -> str:
        return f"{self.work}: {self.done} of {self.total}"


@dataclass(frozen=True)
class LayerMeasured(Progress):
    """The dense pass has measured a layer."""

    work: ClassVar[str] = "measuring"


@dataclass(frozen=True)
class LayerPruned(Progress):
    """A layer is pruned.

    Attributes:
        layer: Its entry in report.json, see `slimllm.pruning.layer_report.LayerReport`.
    """

    layer: Mapping[str, Any]
    work: ClassVar[str] = "pruning"


@dataclass(frozen=True)
class StepTrained(Progress):
    """A training step is done.

    Attributes:
        loss: Mean loss of its examples.
    """

    loss: float
    work: ClassVar[str] = "training"


@dataclass(frozen=True)
class WindowsScored(Progress):
    """Windows of a text have been scored."""

    work: ClassVar[str] = "evaluating"


@dataclass(frozen=True)
class PartWritten(Progress):
    """A layer, or a tensor of a GGUF file, is written."""

    work: ClassVar[str] = "writing"


# Called after every part. An exception raised in it stops the work there.
ProgressCallback = Callable[[Progress], None]
