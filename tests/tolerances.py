"""The one tolerance policy: error(ours, fp64) ≤ 2 × error(plain torch in the same dtype, fp64) + floor(dtype) × scale."""

from __future__ import annotations

import torch

FLOOR = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 1e-12}


def assert_close(
    got: torch.Tensor,
    wanted: torch.Tensor,
    plain: torch.Tensor,
    floor: float,
    scale: torch.Tensor | float | None = None,
) -> None:
    """`got` against the fp64 reference `wanted`, with `plain` the straightforward computation in the same dtype."""
    assert got.shape == wanted.shape
    assert not got.isnan().any()
    if wanted.numel() == 0:
        return
    if scale is None:
        scale = wanted.abs().max()
    error = (got.double() - wanted).abs().max()
    allowed = 2 * (plain.double() - wanted).abs().max() + floor * scale
    assert error <= allowed, f"error {error:.3g} is above {allowed:.3g}"
