"""Structured optimal brain surgeon: remove the units that leave the lowest output error after the rest is refitted."""

from __future__ import annotations

from slimllm.methods.criteria.base import Criterion, register_criterion
from slimllm.methods.elimination import eliminate_channels, eliminate_heads
from slimllm.methods.selection import Selection, complement
from slimllm.methods.statistics import Needs, SublayerStatistics
from slimllm.methods.surgeon import Surgeon, surgeon_for
from slimllm.models.sublayer import Sublayer


@register_criterion("obs")
class Obs(Criterion):
    """Structured optimal brain surgeon: lowest output error after refit, one unit after the other."""

    version = "3"  # larger blocks; half of the inverse
    needs = Needs.COLUMN_GRAM
    needs_recovery = True
    shares_work = True

    def select(self, sublayer: Sublayer, statistics: SublayerStatistics, num_removed: int) -> Selection:
        weight = sublayer.effective_weight()
        gram = statistics.gram if sublayer.takes_bias else statistics.gram.about_zero()
        if sublayer.is_attention:
            found = eliminate_heads(Surgeon(weight, gram), sublayer.units, num_removed, sublayer.groups)
        else:
            found = eliminate_channels(surgeon_for(weight, gram, statistics.ranks), num_removed)
        return Selection(complement(found.order, sublayer.units), found.alone)
