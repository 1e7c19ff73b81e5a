"""Pruning of one sub-layer: collect statistics, select, recover, slice, and update the residual stream."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from slimllm.methods.recovery import Fit, Recovery
from slimllm.methods.statistics import Needs, SublayerStatistics
from slimllm.models.slicing import OutputChange
from slimllm.models.sublayer import Sublayer
from slimllm.plugins import calling
from slimllm.pruning.context import RunContext
from slimllm.pruning.dense_statistics import DenseStatistics, FromDensePass
from slimllm.pruning.streaming import way_of
from slimllm.runtime.distributed import Ranks
from slimllm.runtime.hidden_states import Stream


@dataclass(frozen=True)
class PrunedSublayer:
    """Result of pruning a sub-layer.

    Attributes:
        kept: The kept units, sorted int64 indices; None of a mixture, where every expert keeps its own.
        importance: The criterion's score of every unit; empty for a mixture.
        error_before, error_after: The output's error relative to its variance, without and with the recovery; None: it was
            not measured. Of a mixture, the experts' mean, weighted by their variances.
        statistics: How the statistics were streamed: `gram` (of the columns), `heads`, `output`, `experts` (the
            Gram of each), or `dense` (in the dense pass).
        expert_tokens: Number of tokens that were routed to each expert of a mixture; None: it is not one.
    """

    kept: torch.Tensor | None
    importance: list[float]
    error_before: float | None
    error_after: float | None
    statistics: str
    expert_tokens: list[int] | None = None


def prune_sublayer(
    sublayer: Sublayer, stream: Stream, num_removed: int, run: RunContext, dense: DenseStatistics | None = None
) -> PrunedSublayer:
    """Remove units of a sub-layer, and pass the residual stream through it.

    Args:
        sublayer: The dense sub-layer; its layer is changed.
        stream: The residual stream before the sub-layer; it is changed to the one after it.
        num_removed: Number of units to remove from each group.
        run: The run's context.
        dense: Statistics of the dense model to prune by; None: they are streamed now.
    """
    way = way_of(sublayer, stream, run) if dense is None else FromDensePass(sublayer, stream, run, dense)
    statistics = way.collect()
    kept, importance = select_units(sublayer, statistics, num_removed, run)
    way.prepare(kept)
    fit = fit_change(sublayer, statistics, kept, run)
    with run.watch("recovery"):
        way.apply(kept, fit)
    way.replay(kept, fit)
    return PrunedSublayer(kept, importance, fit.error_before, fit.error_after, way.name)


def select_units(
    sublayer: Sublayer, statistics: SublayerStatistics, num_removed: int, run: RunContext
) -> tuple[torch.Tensor, list[float]]:
    """Return the units that the criterion keeps, sorted int64 indices, and its score of every unit."""
    criterion, ranks = run.config.criterion, statistics.ranks
    with run.watch("heads" if sublayer.is_attention else "channels"):

        def select() -> dict[str, Any]:
            with calling(criterion, _where(sublayer)):
                chosen = criterion.select(sublayer, statistics.seen_by(criterion), num_removed)
                chosen.check(sublayer.units, sublayer.groups, num_removed)
            return {"kept": chosen.kept.tolist(), "importance": chosen.importance.tolist()}

        found = ranks.made_together(select) if criterion.shares_work else ranks.made_by_first(select)
        return torch.tensor(found["kept"], dtype=torch.int64), found["importance"]


def fit_change(sublayer: Sublayer, statistics: SublayerStatistics, kept: torch.Tensor, run: RunContext) -> Fit:
    """Return the recovery's change of the output projection, the same in all processes."""
    recovery, ranks = run.config.recovery, statistics.ranks
    with run.watch("recovery"):
        if recovery.shares_work:
            return recovery.fit(sublayer, statistics.seen_by(recovery), kept)
        with ranks.together(), calling(recovery, _where(sublayer)):
            fit = recovery.fit(sublayer, statistics.seen_by(recovery), kept)
            fit = _checked(fit, sublayer, len(kept) * sublayer.width, recovery)
        return _of_first(fit, ranks)


def _where(sublayer: Sublayer) -> str:
    expert = "" if sublayer.expert is None else f"expert {sublayer.expert} of "
    return f"{expert}the {sublayer.kind} of layer {sublayer.index}"


def _checked(fit: Fit, sublayer: Sublayer, num_columns: int, recovery: Recovery) -> Fit:
    """Check a fit and return it on the layer's device, with a bias if the recovery adds one.

    Raises:
        ValueError: a part of it has another shape, is not finite, or was not declared.
    """
    (outputs, _), device = sublayer.output_projection.weight.shape, sublayer.layer.device
    change = fit.change or OutputChange()
    if change.delta is not None and Needs.COLUMN_GRAM not in recovery.needs:
        raise ValueError("it changes single weights, for which it has to declare Needs.COLUMN_GRAM.")
    if change.intercept is not None and not recovery.adds_bias:
        raise ValueError("it gives an intercept, for which it has to declare adds_bias = True.")
    if change.intercept is not None and not sublayer.takes_bias:
        raise ValueError("it gives an intercept for a sub-layer that takes no bias, but has goes_without_bias = True.")
    shapes = {"intercept": (outputs,), "slope": (outputs,), "delta": (outputs, num_columns)}
    parts: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        value = getattr(change, name)
        if value is not None:
            if value.shape != shape or not bool(value.isfinite().all()):
                raise ValueError(f"{name} must be finite and of shape {shape}, got shape {tuple(value.shape)}.")
            parts[name] = value.to(device, torch.float64)
    errors = [error for error in (fit.error_before, fit.error_after) if error is not None]
    if len(errors) == 1 or not all(map(math.isfinite, errors)):
        raise ValueError(f"its errors must be finite, or both None, got {fit.error_before} and {fit.error_after}.")
    if recovery.adds_bias and sublayer.takes_bias and "intercept" not in parts:  # the output format expects a bias
        parts["intercept"] = torch.zeros(outputs, dtype=torch.float64, device=device)
    return dataclasses.replace(fit, change=OutputChange(**parts) if parts else None)


def _of_first(fit: Fit, ranks: Ranks) -> Fit:
    """Replace the change of a fit by that of the first process, which all processes apply."""
    if ranks.size == 1 or fit.change is None:
        return fit
    parts = {
        name: ranks.of_first(value)
        for name in ("intercept", "slope", "delta")
        if (value := getattr(fit.change, name)) is not None
    }
    return dataclasses.replace(fit, change=OutputChange(**parts))
