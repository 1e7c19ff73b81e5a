"""How much a column of an output projection, or a part of a layer, matters: the criteria beside SlimLLM's.

Pure functions of a layer's weights and of what its statistics say; the least important go.
"""

from __future__ import annotations

import torch

_ROWS = 256  # of a weight in fp64 at a time


def wanda(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Wanda-sp, as in FLAP (arXiv 2312.11983): mean_k |W[k, c]| · ‖Z[:, c]‖₂, from Wanda (arXiv 2306.11695).

    Args:
        weight: W of the output projection, (D, F), any floating dtype.
        norms: ‖Z[:, c]‖₂ of its inputs, (F,) fp64.

    Returns:
        (F,) fp64.
    """
    return sum(rows.double().abs().sum(0) for rows in weight.split(_ROWS)) / len(weight) * norms


def fluctuation(weight: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """FLAP's weighted fluctuation (arXiv 2312.11983): var(Z[:, c]) · ‖W[:, c]‖₂². Arguments as for `wanda`; (F,) fp64."""
    return squares(weight.T) * variance


def squares(weight: torch.Tensor) -> torch.Tensor:
    """‖W[c, :]‖₂² of every row: (rows,) fp64. Magnitude pruning adds up those of all rows and columns that go together."""
    return torch.cat([rows.double().square().sum(1) for rows in weight.split(_ROWS)])


def random_scores(number: int, seed: int, layer: int, part: int) -> torch.Tensor:
    """A seeded uniform draw, (number,) fp64 on the CPU, of its own for every part of every layer."""
    generator = torch.Generator().manual_seed((1_000_003 * seed + 2 * layer + part) % 2**63)
    return torch.rand(number, generator=generator, dtype=torch.float64)


def input_importance(weight: torch.Tensor, input_norms: torch.Tensor) -> torch.Tensor:
    """I_gate(c) or I_up(c) = ‖W[c,:] ∘ n‖₂ with n_j = ‖x[:,j]‖₂.

    Args:
        weight: gate_proj.weight or up_proj.weight (I, D).
        input_norms: n, (D,).

    Returns:
        (I,) fp64.
    """
    squares = weight.float().square() @ input_norms.square().float()
    return squares.double().sqrt()
