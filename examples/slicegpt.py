"""A SliceGPT-style PCA of a layer (arXiv 2401.15024), on slimllm's statistics.

What enters a sub-layer lies near a subspace. With Q (D, r) the leading eigenvectors of E x xᵀ, the sub-layer computes on
Qᵀx instead of x, and its first weights become W Q. (SliceGPT proper does so with the residual stream of the whole model,
where Q is absorbed by the layer before; here x is the input of the FFN, and Qᵀ stays as a factor of its own.)
"""

from __future__ import annotations

import torch
from harness import input_statistics, run
from torch import nn
from transformers import PreTrainedModel

from slimllm.statistics import GramStatistics


def principal_directions(inputs: GramStatistics, width: int) -> tuple[torch.Tensor, float]:
    """Q (D, width), orthonormal columns, and the fraction of E‖x‖² that lies in their span."""
    second_moment = inputs.covariance() + torch.outer(inputs.mean(), inputs.mean())  # E x xᵀ
    eigenvalues, vectors = torch.linalg.eigh(second_moment)
    return vectors[:, -width:], float(eigenvalues[-width:].sum() / eigenvalues.sum())


def prune(model: PreTrainedModel, token_ids: torch.Tensor, ratio: float = 0.2) -> None:
    """Let every FFN see its input through that much fewer directions, in place (the hook is not saved with the model)."""
    for name, inputs in input_statistics(model, token_ids, "mlp.gate_proj", GramStatistics).items():
        ffn = model.get_submodule(name.removesuffix(".gate_proj"))
        directions, fraction = principal_directions(inputs, round((1 - ratio) * inputs.features))
        directions = directions.to(ffn.gate_proj.weight)
        for projection in (ffn.gate_proj, ffn.up_proj):
            projection.weight = nn.Parameter(projection.weight @ directions)
        ffn.register_forward_pre_hook(lambda _, arguments, directions=directions: (arguments[0] @ directions,))
        print(f"{name}: {len(directions)} -> {directions.shape[1]} directions hold {100 * fraction:.2f} % of the input")


if __name__ == "__main__":
    run(prune)
