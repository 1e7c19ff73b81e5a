"""Self-check: a small comparison of a kernel with torch, made before the kernel is used on a GPU by default."""

from __future__ import annotations

import torch

from slimllm.ops.registry import OPERATIONS, forced

# Enough for a GPU to split them over programs.
MANY_TOKENS = 2048


def difference(operation: str, device: torch.device, backend: str) -> float:
    """Return the largest difference between the backend's results and torch's, relative to torch's largest result."""
    with forced("torch"):
        wanted = _run(operation, device)
    with forced(backend):
        got = _run(operation, device)
    differences = [
        (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)
        for a, b in zip(got, wanted, strict=True)
    ]
    return float(torch.stack(differences).max())  # propagates NaN, unlike Python's max


def _run(operation: str, device: torch.device) -> list[torch.Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(device)

    cases = OPERATIONS[operation].cases
    if cases is None:
        raise ValueError(f"{operation} has no kernel.")
    return cases(random, MANY_TOKENS)
