"""Large systems with few right-hand sides: factored in fp32, refined to the residual of fp64 work."""

from __future__ import annotations

import torch

# Where it pays, by count: the factor's k³/6 multiply-adds run at fp32's rate, each residual's k²m in fp64. On a CPU, and on
# GPUs whose fp64 is as fast, measured and counted, it never does; on others fp64 is 32 or 64 times slower than fp32.
SMALLEST, UNKNOWNS_PER_COLUMN = 512, 32
_FAST_FP64 = ((8, 0), (9, 0), (10, 0))  # compute capabilities: A100, H100, B200
# A correction shrinks the error by about k·eps32 times the condition number. What three do not finish is left to fp64.
_CORRECTIONS = 3
_ROWS = 512  # of G in fp64 at a time


def pays(device: torch.device, size: int, columns: int) -> bool:
    """Whether `refined_solve` is the faster way to solve systems of this size on a device."""
    if size < SMALLEST or columns * UNKNOWNS_PER_COLUMN > size or device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) not in _FAST_FP64


def symmetric_product(gram: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """G x in fp64 from the lower half of G, (batch, k, k), of which a few rows at a time are converted; x (batch, k, m)."""
    result = torch.zeros_like(x, dtype=torch.float64)
    for start in range(0, gram.shape[1], _ROWS):
        rows = gram[:, start : start + _ROWS, : start + _ROWS].double()
        end = start + rows.shape[1]
        before, own = rows[:, :, :start], rows[:, :, start:].tril()
        result[:, start:end] += before @ x[:, :start] + (own + own.tril(-1).mT) @ x[:, start:end]
        result[:, :start] += before.mT @ x[:, start:end]
    return result


def refined_solve(
    gram: torch.Tensor, right: torch.Tensor, diagonal: torch.Tensor, ridge: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """X of (G + λI) X = R in fp64, and which systems were not solved to its accuracy.

    With D the square root of the diagonal, D⁻¹(G + λI)D⁻¹ = LLᵀ in fp32; then X ← X + D⁻¹(LLᵀ)⁻¹D⁻¹(R - (G + λI)X) with
    residuals in fp64. Solved is a system whose last residual is at most √k · eps64 · ‖A‖ ‖X‖ in D's units, the measure of
    LAPACK's dsposv. Waits for no device. In memory beside the arguments: one fp32 matrix, replaced by its factor.

    Args:
        gram: G, (batch, k, k) fp32 or fp64; the lower half is read.
        right: R, (batch, k, m) fp64; 0 where the diagonal of G is.
        diagonal: Of G + λI, (batch, k) fp64, positive.
        ridge: λ, (batch,) fp64.
    """
    size = gram.shape[1]
    scale = diagonal.rsqrt()[..., None]
    # By rows, so that for LAPACK, which reads by columns, it is the upper half and factored in place.
    system = gram.float() if gram.dtype != torch.float32 else gram.clone(memory_format=torch.contiguous_format)
    rough = scale.float()
    system.mul_(rough).mul_(rough.mT)
    system.tril_()
    sums = [torch.linalg.vector_norm(system, ord=1, dim=dim).amax(-1).double() for dim in (1, 2)]
    norm = sums[0] + sums[1]  # at least the largest sum of a row of |A|, at most twice that
    system.diagonal(dim1=1, dim2=2).fill_(1.0)
    upper, status = system.mT, torch.empty(len(gram), dtype=torch.int32, device=gram.device)
    torch.linalg.cholesky_ex(upper, upper=True, out=(upper, status))

    def rough_solve(residual: torch.Tensor) -> torch.Tensor:
        # To its own size, as fp32 has a smaller range.
        size_of = residual.abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        inner = torch.linalg.solve_triangular(upper.mT, (residual / size_of).float(), upper=False)
        return torch.linalg.solve_triangular(upper, inner, upper=True).double() * size_of

    # In D's units: x = D X, r = D⁻¹(R - …).
    solution = rough_solve(scale * right)
    for correction in range(_CORRECTIONS + 1):
        unscaled = scale * solution
        residual = scale * (right - symmetric_product(gram, unscaled) - ridge[:, None, None] * unscaled)
        if correction < _CORRECTIONS:
            solution += rough_solve(residual)
    allowed = size**0.5 * torch.finfo(torch.float64).eps * norm[:, None] * solution.abs().amax(1)
    unsolved = (status != 0) | ~(residual.abs().amax(1) <= allowed).all(-1)
    return scale * solution, unsolved
