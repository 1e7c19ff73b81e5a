"""Streaming statistics of activations: constant memory, any split into batches.

They stay accurate where the mean is far larger than the spread.
"""

from slimllm.statistics.columns import ColumnStatistics, PairedMoments
from slimllm.statistics.gram import TILE, GramStatistics
from slimllm.statistics.heads import HeadStatistics, mean_output
from slimllm.statistics.tokens import layer_similarity, token_weights

__all__ = [
    "TILE",
    "ColumnStatistics",
    "GramStatistics",
    "HeadStatistics",
    "PairedMoments",
    "layer_similarity",
    "mean_output",
    "token_weights",
]
