"""What an allocation is: how the parameters to remove are spread over the layers."""

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
from slimllm.statistics import ColumnStatistics, GramStatistics

register_allocation = ALLOCATIONS.register


@dataclass(frozen=True)
class Wanted:
    """What an allocation makes of a ratio.

    Attributes:
        ratio: Fraction of the layers' parameters to remove.
        pruned_layers: How many layers give something, at first.
        alpha: Temperature of a softmax over the layers' importances, for the report; 0: none.
        notes: Sentences without a full stop, worth knowing.
    """

    ratio: float
    pruned_layers: int
    alpha: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """What is to be spread.

    Attributes:
        target: Parameters to remove, biases of the recovery made up for.
        round_to: Kept FFN widths are multiples of this.
        shapes: Sizes of every layer, in the units in which it is pruned.
        similarity: c of every layer, the mean cosine between its input and output.
        wanted: What the allocation made of the ratio.
        curves: What every layer loses, where the allocation measures it; None: it does not.
    """

    target: int
    round_to: int
    shapes: Sequence[LayerShape]
    similarity: Sequence[float]
    wanted: Wanted
    curves: Sequence[Curves] | None = None


@dataclass(frozen=True)
class Removals:
    """What every layer gives; how many layers were to give something; and notes."""

    layers: list[LayerRemoval]
    pruned_layers: int
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DenseSublayer:
    """A sub-layer of the dense model and what was streamed of it, for an allocation that measures.

    Attributes:
        sublayer: The dense sub-layer.
        columns: Statistics of the inputs z of its output projection: a `GramStatistics` with `Needs.COLUMN_GRAM`.
        stream_square: Mean square of the residual stream after the sub-layer, summed over all tokens.
        weighted: Whether tokens are weighted by what the next norm divides them by (token weights `norm`).
        shape: Sizes of the layer.
    """

    sublayer: Sublayer
    columns: ColumnStatistics | GramStatistics
    stream_square: float
    weighted: bool
    shape: LayerShape


class Allocation(Method, ABC):
    """Spreads the parameters to remove over the layers.

    Attributes:
        needs: What is streamed of every sub-layer of the dense model for `costs`, `Needs.COLUMNS` or `Needs.COLUMN_GRAM`;
            None: `costs` is not called, and only the layers' similarities are measured.
        by_sensitivity: Whether costs are multiplied by how strongly the model's output reacts to a sub-layer's error.
        alike: Whether all layers give the same where they are alike.
    """

    needs: ClassVar[Needs | None] = None
    by_sensitivity: ClassVar[bool] = False
    alike: ClassVar[bool] = False

    def check(self, heads_multiple_of: int) -> None:
        """Refuse settings of a run that the allocation cannot meet, by an InputError; by default none."""

    def wanted(self, ratio: float, num_layers: int) -> Wanted:
        """What a ratio means: by default the fraction of the parameters of all layers."""
        return Wanted(ratio, num_layers)

    def costs(self, dense: DenseSublayer) -> torch.Tensor:
        """What is lost by each further unit that is removed of every group, in the order in which they are, (rounds,) fp64.

        There are `dense.sublayer.units // dense.sublayer.groups` rounds. The first process alone calls it.
        """
        raise NotImplementedError(f"{type(self).__name__} needs statistics, so it has to define costs().")

    @abstractmethod
    def allocate(self, request: Request) -> Removals:
        """Decide how many units and channels every layer gives; the first process alone calls it.

        Units are multiples of a shape's `unit_step`, and so many channels are removed that the kept width is a multiple of
        `round_to`; a layer keeps one of each at least.
        """


def spend_at_least_cost(request: Request) -> Removals:
    """Remove the parameters where a parameter costs least, by the curves that the allocation measured."""
    if request.curves is None:
        raise ValueError("there are no curves; an allocation that spends by them has to declare what it needs.")
    layers = []
    spent = spend(list(request.curves), list(request.shapes), request.target, request.round_to)
    for (units, channels), shape in zip(spent, request.shapes):
        removed = removed_params(LayerRemoval(0.0, units, channels), shape)
        layers.append(LayerRemoval(removed / shape.params, units, channels))
    return Removals(layers, sum(removal.pruned for removal in layers))
