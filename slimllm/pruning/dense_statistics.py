"""Statistics of a sub-layer of the dense model, and pruning by them: no calibration window passes the pruned layers."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from slimllm.methods.moments import OutputMeans
from slimllm.methods.recovery import Fit
from slimllm.methods.statistics import SublayerStatistics
from slimllm.models.sublayer import Sublayer, add_update
from slimllm.pruning.context import RunContext
from slimllm.pruning.streaming import Way
from slimllm.runtime.hidden_states import Stream
from slimllm.statistics import ColumnStatistics, GramStatistics, mean_output


@dataclass(frozen=True)
class DenseStatistics:
    """Statistics of one sub-layer, in plain JSON types, for the journal.

    Attributes:
        columns: Those of the columns z of the output projection, see `packed`.
        inputs: Those of an FFN's inputs; None for attention.
    """

    columns: dict[str, Any]
    inputs: dict[str, Any] | None


def packed(statistics: ColumnStatistics | GramStatistics) -> dict[str, Any]:
    """Return count, mass, and mean and variance (fp64, base64) of all columns."""

    def text(values: torch.Tensor) -> str:
        return base64.b64encode(values.cpu().numpy().astype("<f8").tobytes()).decode()

    return {
        "count": statistics.count,
        "mass": statistics.mass,
        "mean": text(statistics.mean()),
        "variance": text(statistics.variance()),
    }


def unpacked(saved: dict[str, Any], device: torch.device) -> ColumnStatistics:
    """Return the statistics of which `packed` made `saved`."""

    def values(name: str) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(base64.b64decode(saved[name]), "<f8").astype(np.float64)).to(device)

    mean, variance = values("mean"), values("variance")
    statistics = ColumnStatistics(len(mean), device)
    statistics.count, statistics.mass, statistics.pivot = saved["count"], saved["mass"], mean.float()
    shift = mean - statistics.pivot.double()
    statistics.total, statistics.squares = saved["mass"] * shift, saved["mass"] * (variance + shift.square())
    return statistics


class FromDensePass(Way):
    """Statistics that the dense pass has collected. The stream has only the windows that judge the result."""

    name = "dense"

    def __init__(self, sublayer: Sublayer, stream: Stream, run: RunContext, dense: DenseStatistics) -> None:
        super().__init__(sublayer, stream, run)
        self.dense = dense

    def collect(self) -> SublayerStatistics:
        device = self.sublayer.layer.device
        columns = unpacked(self.dense.columns, device)
        inputs = None if self.dense.inputs is None else unpacked(self.dense.inputs, device)
        return SublayerStatistics(self.sublayer, columns, inputs, None, _means, self.stream.ranks)

    def prepare(self, kept: torch.Tensor) -> None:
        pass

    def apply(self, kept: torch.Tensor, fit: Fit) -> None:
        self.sublayer.layer.replace(self.sublayer.sliced(kept, fit.change))

    def replay(self, kept: torch.Tensor, fit: Fit) -> None:
        for batch in self.stream:
            with self.watch("perplexity"):
                add_update(batch, self.sublayer)


def _means(statistics: SublayerStatistics, kept: torch.Tensor) -> OutputMeans:
    sublayer, mean = statistics.sublayer, statistics.columns.mean()
    weight, columns = sublayer.output_projection.weight, sublayer.columns_of(kept).to(mean.device)
    return OutputMeans(mean_output(weight, mean)[0], mean_output(weight[:, columns], mean[columns])[0])
