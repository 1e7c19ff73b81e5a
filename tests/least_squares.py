"""Test systems of normal equations, and their solution in fp64."""

from __future__ import annotations

import torch


def normal_equations(
    batch: int, k: int, m: int, condition: float = 10.0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make systems AᵀA (batch, k, k) and AᵀB (batch, k, m) of about the given condition number.

    The columns of A differ in size by up to the root of it.
    """
    generator = torch.Generator().manual_seed(1000 * k + m)
    a = torch.randn(batch, 3 * k, k, generator=generator, dtype=torch.float64)
    a = a * torch.logspace(0, -0.5 * torch.log10(torch.tensor(condition)).item(), k, dtype=torch.float64)
    b = torch.randn(batch, 3 * k, m, generator=generator, dtype=torch.float64)
    return (a.mT @ a).to(dtype), (a.mT @ b).to(dtype)


def reference(gram: torch.Tensor, cross: torch.Tensor, ridge: torch.Tensor, absolute: bool = False) -> torch.Tensor:
    gram, cross = gram.double(), cross.double()
    if not absolute:
        ridge = ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    system = gram + ridge[:, None, None] * torch.eye(gram.shape[-1], dtype=torch.float64)
    return torch.linalg.solve(system, cross)
