"""Scores of single columns of an output projection: pure functions of its weight and of the statistics of its inputs."""

from __future__ import annotations

import torch

_ROWS = 256  # rows of a weight that are in fp64 at a time


def wanda(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Compute Wanda-sp as in FLAP (arXiv 2312.11983): mean_k |W[k, c]| · ‖Z[:, c]‖₂, from Wanda (arXiv 2306.11695).

    Args:
        weight: W of the output projection, (D, F), any floating dtype.
        norms: ‖Z[:, c]‖₂ of its inputs, (F,) fp64.

    Returns:
        (F,) fp64.
    """
    return sum(rows.double().abs().sum(0) for rows in weight.split(_ROWS)) / len(weight) * norms


def fluctuation(weight: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Compute FLAP's weighted fluctuation (arXiv 2312.11983), (F,) fp64: var(Z[:, c]) · ‖W[:, c]‖₂².

    Arguments are as for `wanda`.
    """
    return squares(weight.T) * variance


def flap(weight: torch.Tensor, variance: torch.Tensor, is_attention: bool) -> torch.Tensor:
    """Compute FLAP's score of columns, (F,) fp64: their fluctuation, squared in attention, as FLAP's code has it.

    Arguments are as for `fluctuation`.
    """
    score = fluctuation(weight, variance)
    return score.square() if is_attention else score


def squares(weight: torch.Tensor) -> torch.Tensor:
    """Compute ‖W[c, :]‖₂² of every row, (rows,) fp64; magnitude pruning sums them over all rows and columns of a unit."""
    return torch.cat([rows.double().square().sum(1) for rows in weight.split(_ROWS)])
