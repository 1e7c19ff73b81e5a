"""Pruning of an FFN that is a mixture of experts: each expert as an FFN of its own, all to the same width.

With the gates g, a mixture's output is y_t = Σ_e g_te W_e z_te, over the experts that token t is routed to. An error of
expert e is multiplied by g_te, so its statistics are those of the tokens that are routed to it, weighted by g_te², and with
token weights by the token's own, too. With these weights an expert is pruned as a dense FFN is, by the same methods. The
router stays as it is.
"""

from __future__ import annotations

import torch

from slimllm.methods.criteria.magnitude import Magnitude
from slimllm.methods.statistics import SublayerStatistics
from slimllm.models.mixture import Routed, route
from slimllm.models.slicing import Tensors
from slimllm.models.sublayer import Sublayer, add_update
from slimllm.pruning.context import RunContext
from slimllm.pruning.streaming import column_statistics, empty_gram
from slimllm.pruning.sublayer import PrunedSublayer, fit_change, select_units
from slimllm.runtime.distributed import Ranks
from slimllm.runtime.hidden_states import Placement, Stream
from slimllm.runtime.memory import trim
from slimllm.statistics import ColumnStatistics, GramStatistics


class ExpertStatistics:
    """Streamed statistics of every expert of a mixture.

    Args:
        ffn: The mixture.
        placement: Where Grams are stored.
        weighted: Whether tokens are weighted as the next norm scales them.

    Attributes:
        columns: Gram of z, by expert; None: it has been freed.
        inputs, outputs: Statistics of the experts' inputs, and of their outputs.
        tokens: Number of all tokens.
    """

    def __init__(self, ffn: Sublayer, placement: Placement, weighted: bool) -> None:
        self._experts, self._weighted, self.tokens = ffn.experts, weighted, 0
        device, hidden_size = ffn.layer.device, len(ffn.experts[0].output_projection.weight)
        self.columns: list[GramStatistics | None] = [empty_gram(one, placement) for one in ffn.experts]
        self.inputs = [ColumnStatistics(hidden_size, device) for _ in ffn.experts]
        self.outputs = [ColumnStatistics(hidden_size, device) for _ in ffn.experts]

    def update(self, parts: list[Routed], x: torch.Tensor, weights: torch.Tensor) -> None:
        """Add a batch.

        Args:
            parts: What `route` returned for it.
            x: The norm's output, (num_tokens, D).
            weights: The tokens' own weights, (num_tokens,).
        """
        self.tokens += len(x)
        for part in parts:
            own = part.gates.float().square()
            if self._weighted:
                own = own * weights[part.tokens]
            self.gram(part.number).update(part.inner, own)
            self.inputs[part.number].update(x[part.tokens], own)
            self.outputs[part.number].update(part.output, own)

    def add_up(self, ranks: Ranks) -> None:
        """Add up the statistics of all processes."""
        ranks.add_up(*map(self.gram, range(len(self.columns))), *self.inputs, *self.outputs)
        self.tokens = sum(ranks.everyone(self.tokens))

    def of_expert(self, number: int, ranks: Ranks) -> SublayerStatistics | None:
        """Return the statistics of an expert; None: no token was routed to it."""
        if self.outputs[number].mass <= 0:
            return None
        return column_statistics(self._experts[number], self.gram(number), self.inputs[number], self.outputs[number], ranks)

    def gram(self, number: int) -> GramStatistics:
        """Return the Gram of an expert's columns, which has not been freed."""
        gram = self.columns[number]
        assert gram is not None
        return gram

    def energy(self, number: int) -> float:
        """Return Σ_t w_t g_t² ‖W z_t - E(W z)‖² of an expert."""
        outputs = self.outputs[number]
        return outputs.mass * float(outputs.variance().sum()) if outputs.mass > 0 else 0.0


def prune_experts(ffn: Sublayer, stream: Stream, num_removed: int, run: RunContext) -> PrunedSublayer:
    """Remove channels of every expert, and pass the residual stream through the mixture.

    Experts to which no token was routed lose the channels with the smallest weights.

    Args:
        ffn: The mixture; its layer is changed.
        stream: The residual stream before it; it is changed to the one after it.
        num_removed: Number of channels to remove from each expert.
        run: The run's context.

    Returns:
        The result; its errors are the experts' relative errors, weighted by the variances of what they add.
    """
    config, watch, ranks = run.config, run.watch, stream.ranks
    with ranks.together():  # the disk can be full
        statistics = ExpertStatistics(ffn, stream.placement, config.token_weights == "norm")
    for batch in stream:
        with watch("forward"):
            hidden = batch.hidden.load()
            x = ffn.norm(hidden).flatten(0, 1)
            parts, output = route(ffn, x)
        with watch("statistics"):
            statistics.update(parts, x, ffn.token_weights(hidden, output))
    del hidden, x, parts, output
    with watch("statistics"):
        statistics.add_up(ranks)
    trim()
    sliced: Tensors = {}
    errors: list[tuple[float, float | None, float | None]] = []
    for number, expert in enumerate(ffn.experts):
        found = statistics.of_expert(number, ranks)
        if found is None:
            own = Magnitude().select(expert, unseen(expert, ranks), num_removed).kept
            kept, change = torch.tensor(ranks.tell(own.tolist())), None
        else:
            kept, _ = select_units(expert, found, num_removed, run)
            fit = fit_change(expert, found, kept, run)
            errors.append((statistics.energy(number), fit.error_before, fit.error_after))
            change = fit.change
            del fit
        with watch("recovery"):
            whole = expert.layer.tensors
            pruned = expert.sliced(kept, change)
            sliced |= {name: tensor for name, tensor in pruned.items() if tensor is not whole.get(name)}
        del found, change, pruned
        statistics.columns[number] = None
    with watch("recovery"):
        ffn.layer.replace({**ffn.layer.tensors, **sliced})
    for batch in stream:
        with watch("forward"):
            add_update(batch, ffn)
    before, after = (_mean([(energy, pair[when]) for energy, *pair in errors]) for when in (0, 1))
    tokens = [one.count if one.mass > 0 else 0 for one in statistics.outputs]
    return PrunedSublayer(None, [], before, after, "experts", tokens)


def unseen(expert: Sublayer, ranks: Ranks) -> SublayerStatistics:
    """Return the statistics of an expert without tokens, of which only the weights are of use."""
    features, outputs = expert.units, len(expert.output_projection.weight)
    empty = ColumnStatistics(features), ColumnStatistics(outputs)
    return SublayerStatistics(expert, *empty, None, None, ranks)


def _mean(values: list[tuple[float, float | None]]) -> float | None:
    """Return the mean of values with weights; None: there are none."""
    known = [(weight, value) for weight, value in values if value is not None]
    total = sum(weight for weight, _ in known)
    return sum(weight * value for weight, value in known) / total if total > 0 else None
