"""Context of a run, which all of its parts need: model, windows, settings, placement of tensors, stopwatch and record."""

from __future__ import annotations

from dataclasses import dataclass, field

from slimllm.calibration import Calibration
from slimllm.checkpoints.resume import Record
from slimllm.checkpoints.source import ModelSource
from slimllm.config import PruneConfig
from slimllm.runtime.distributed import Ranks
from slimllm.runtime.hidden_states import Placement
from slimllm.runtime.progress import ProgressCallback
from slimllm.runtime.stopwatch import Stopwatch


@dataclass(frozen=True)
class RunContext:
    """Context of one run of the engine.

    Attributes:
        source: The model.
        calibration: The windows of all ranks, and those held out of the statistics.
        config: The settings.
        placement: Where token-sized tensors are stored.
        watch: The stopwatch, which counts seconds by stage.
        ranks: The processes that share the windows.
        record: Record of every layer that is done; recorded layers are skipped. None: nothing is recorded.
        progress: Called after every layer.
    """

    source: ModelSource
    calibration: Calibration
    config: PruneConfig
    placement: Placement
    watch: Stopwatch
    ranks: Ranks = field(default_factory=Ranks)
    record: Record | None = None
    progress: ProgressCallback | None = None
