"""Base class of allocations, which spread the parameters to remove over the layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from slimllm.methods.allocation.removal import LayerRemoval, LayerShape, removed_params
from slimllm.methods.allocation.spending import Curves, spend
from slimllm.methods.statistics import Needs
from slimllm.models.sublayer import Sublayer
from slimllm.plugins import ALLOCATIONS, Method
from slimllm.runtime.distributed import Ranks
from slimllm.statistics import ColumnStatistics, GramStatistics

register_allocation = ALLOCATIONS.register


@dataclass(frozen=True)
class Wanted:
    """A ratio as an allocation interprets it.

    Attributes:
        ratio: Fraction of the layers' parameters to remove.
        pruned_layers: Number of layers to prune; `allocate` may need more.
        alpha: Temperature of a softmax over the layers' importances, for the report; 0: none.
        notes: Notes for the user: sentences without a full stop.
    """

    ratio: float
    pruned_layers: int
    alpha: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """Input of an allocation.

    Attributes:
        target: Number of parameters to remove, net of the biases that the recovery adds.
        round_to: Kept FFN widths are multiples of this.
        shapes: Sizes of every layer, in the units in which it is pruned.
        similarity: c of every layer, the mean cosine between its input and output.
        wanted: The ratio as the allocation interprets it.
        curves: Loss curves of every layer; None: the allocation does not measure them.
    """

    target: int
    round_to: int
    shapes: Sequence[LayerShape]
    similarity: Sequence[float]
    wanted: Wanted
    curves: Sequence[Curves] | None = None


@dataclass(frozen=True)
class Removals:
    """What every layer loses, the number of layers that were to be pruned, and notes for the user."""

    layers: list[LayerRemoval]
    pruned_layers: int
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DenseSublayer:
    """A sub-layer of the dense model and its streamed statistics, for an allocation that measures.

    Attributes:
        sublayer: The dense sub-layer.
        columns: Statistics of the inputs z of its output projection: a `GramStatistics` with `Needs.COLUMN_GRAM`.
        tokens: Number of tokens that pass the layer; an expert of a mixture has seen fewer.
        stream_square: Mean square of the residual stream after the sub-layer, summed over all tokens.
        weighted: Whether tokens are weighted as the next norm scales them (token weights `norm`).
        shape: Sizes of the layer.
        ranks: The processes of the run.
    """

    sublayer: Sublayer
    columns: ColumnStatistics | GramStatistics
    tokens: int
    stream_square: float
    weighted: bool
    shape: LayerShape
    ranks: Ranks = field(default_factory=Ranks)


class Allocation(Method, ABC):
    """Method that spreads the parameters to remove over the layers.

    Attributes:
        needs: The statistics of every sub-layer of the dense model that are streamed for `costs`, `Needs.COLUMNS` or
            `Needs.COLUMN_GRAM`; None: `costs` is not called, and only the layers' similarities are measured.
        by_sensitivity: Whether costs are multiplied by how strongly the model's output reacts to a sub-layer's error.
        alike: Whether all layers lose the same if they have equal sizes.
        shares_work: Whether the processes of a run share the work of `costs`: all of them call it, and the first one's
            result is used.
    """

    needs: ClassVar[Needs | None] = None
    by_sensitivity: ClassVar[bool] = False
    alike: ClassVar[bool] = False
    shares_work: ClassVar[bool] = False

    def check(self, heads_multiple_of: int) -> None:
        """Raise InputError for settings of a run that the allocation cannot meet; the default accepts all settings."""

    def wanted(self, ratio: float, num_layers: int) -> Wanted:
        """Interpret a ratio; by default it is the fraction of the parameters of all layers."""
        return Wanted(ratio, num_layers)

    def dense_windows(self, samples: int) -> int:
        """Return how many of the calibration windows the dense pass takes; by default all of them.

        For a Gram (`needs`), it takes at least as many tokens as the widest FFN has channels. It takes all windows if the
        criterion and the recovery prune by its statistics.
        """
        return samples

    def costs(self, dense: DenseSublayer) -> torch.Tensor:
        """Return the cost of removing each further unit from every group, in the order of removal, (rounds,) fp64.

        There are `dense.sublayer.units // dense.sublayer.groups` rounds. Only the first process calls this, or
        all if they share the work.
        """
        raise NotImplementedError(f"{type(self).__name__} needs statistics, so it has to define costs().")

    @abstractmethod
    def allocate(self, request: Request) -> Removals:
        """Decide how many units and channels every layer loses; only the first process calls this.

        The number of removed units must be one of a shape's `removable`. If channels are removed, the kept width must be a
        multiple of `round_to`. Every layer must keep at least one unit and one channel.
        """


def enough_windows(samples: int) -> int:
    """Return how many windows give nearly the same allocation as all of them (benchmarks/NOTES.md): 3 of 8, at least 12."""
    return min(samples, max(12, 3 * samples // 8))


def spend_at_least_cost(request: Request) -> Removals:
    """Remove parameters where they cost least, according to the curves that the allocation measured."""
    if request.curves is None:
        raise ValueError("there are no curves; an allocation that uses them has to declare its needs.")
    layers = []
    spent = spend(list(request.curves), list(request.shapes), request.target, request.round_to)
    for (units, channels), shape in zip(spent, request.shapes):
        removed = removed_params(LayerRemoval(0.0, units, channels), shape)
        layers.append(LayerRemoval(removed / shape.params, units, channels))
    return Removals(layers, sum(removal.pruned for removal in layers))
