"""The paper's criterion (arXiv 2505.22689): Pearson similarity for heads, feature-space importance for channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slimllm import ops
from slimllm.errors import InputError
from slimllm.methods.criteria.base import Criterion, register_criterion
from slimllm.methods.selection import Selection, select_channels
from slimllm.methods.statistics import Needs, SublayerStatistics
from slimllm.models.sublayer import Sublayer


@register_criterion("slimllm")
class SlimLLM(Criterion):
    """Choice of heads by Pearson similarity of the output and a greedy exchange, of channels by I_gate + I_up + I_down."""

    version = "2"  # wide layers on a CPU without eigenvectors
    needs = Needs.OUTPUT_GRAM
    attention_gram = False

    @dataclass(frozen=True)
    class Settings:
        """Options of the criterion slimllm.

        Attributes:
            keep_lowest: Fraction of the channels that are kept although they are the least important. The authors'
                published implementation does this (1 %, as in the preset `paper`); their paper does not mention it.
        """

        keep_lowest: float = 0.0

        def __post_init__(self) -> None:
            if not 0 <= self.keep_lowest < 1:
                raise InputError(
                    f"slimllm.keep_lowest must be a fraction of the channels, from 0 to below 1, got {self.keep_lowest}."
                )

    def select(self, sublayer: Sublayer, statistics: SublayerStatistics, num_removed: int) -> Selection:
        if sublayer.is_attention:
            covariance = statistics.unit_covariance()
            group_size = 1 if sublayer.groups == 1 else sublayer.units // sublayer.groups
            kept = ops.pearson_greedy(covariance, num_removed * sublayer.groups, group_size)
            return Selection(kept.cpu(), ops.head_importance(covariance))
        # On a CPU the published variant always takes LAPACK's eigenvectors, so that results stay the same to the last bit.
        published = self.settings.keep_lowest > 0 and sublayer.layer.device.type == "cpu"
        importance = channel_importance(sublayer, statistics, "eigh" if published else None)
        keep_lowest = round(self.settings.keep_lowest * len(importance))
        return Selection(select_channels(importance, num_removed, keep_lowest), importance)


def channel_importance(sublayer: Sublayer, statistics: SublayerStatistics, method: str | None = None) -> torch.Tensor:
    """Compute I_gate + I_up + I_down of every channel, (I,) fp64; `method` is that of `ops.feature_space_importance`."""
    layer, gain = sublayer.layer, sublayer.post_norm_gain()
    covariance, input_norms = statistics.output_covariance(), statistics.inputs.norms()
    if gain is not None:
        covariance = covariance * gain.double()[:, None] * gain.double()
    norms = statistics.columns.norms().to(layer.device)
    importance = ops.feature_space_importance(sublayer.effective_weight(), covariance, norms, method)
    for projection in sublayer.unit_rows:
        importance += input_importance(sublayer.weight_of(projection), input_norms)
    return importance


def input_importance(weight: torch.Tensor, input_norms: torch.Tensor) -> torch.Tensor:
    """Compute I_gate(c) or I_up(c) = ‖W[c,:] ∘ n‖₂ with n_j = ‖x[:,j]‖₂.

    Args:
        weight: gate_proj.weight or up_proj.weight (I, D).
        input_norms: n, (D,).

    Returns:
        (I,) fp64.
    """
    squares = weight.float().square() @ input_norms.square().float()
    return squares.double().sqrt()
