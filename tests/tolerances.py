"""The one tolerance policy: error(ours, fp64) ≤ 2 × error(plain torch in the same dtype, fp64) + floor(dtype) × scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch

FLOOR = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 1e-12}


def assert_close(
    got: torch.Tensor,
    wanted: torch.Tensor,
    plain: torch.Tensor | Sequence[torch.Tensor],
    floor: float,
    scale: torch.Tensor | float | None = None,
) -> None:
    """Compare `got` with the fp64 reference `wanted`; `plain` is the straightforward computation in the same dtype.

    If rounding is amplified, a single plain computation may be accurate by chance; of several, the worst counts.
    """
    assert got.shape == wanted.shape
    assert not got.isnan().any()
    if wanted.numel() == 0:
        return
    if scale is None:
        scale = wanted.abs().max()
    error = (got.double() - wanted).abs().max()
    plains = [plain] if isinstance(plain, torch.Tensor) else plain
    allowed = 2 * max((one.double() - wanted).abs().max() for one in plains) + floor * scale
    assert error <= allowed, f"error {error:.3g} is above {allowed:.3g}"
