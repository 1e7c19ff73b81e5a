"""Large systems factored in fp32 and refined, as GPUs with slow fp64 solve them, against fp64; here on the CPU."""

from __future__ import annotations

import pytest
import torch

from slimllm import ops
from slimllm.ops import refine

EPS = torch.finfo(torch.float64).eps


def systems(k: int, m: int, log_condition: float, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two correlation-like systems of a condition that scaling cannot take away, times columns of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(2, k, k, generator=generator, dtype=torch.float64))[0]
    a = q * torch.logspace(0, -log_condition / 2, k, dtype=torch.float64)
    a = torch.linalg.qr(torch.randn(2, k, k, generator=generator, dtype=torch.float64))[0] @ a.mT  # no axis is its own
    a = a * torch.logspace(0, 3, k, dtype=torch.float64)
    return (a.mT @ a).to(dtype), torch.randn(2, k, m, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture
def slow_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimllm.ops.refine._ROWS", 100)
    monkeypatch.setitem(ops.lstsq_ex.__globals__, "pays", lambda *arguments: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("k", "m", "log_condition"), [(1, 1, 0.0), (99, 1, 1.0), (130, 3, 2.0), (700, 2, 3.0)])
def test_residual_is_that_of_fp64(dtype: torch.dtype, k: int, m: int, log_condition: float, slow_fp64: None) -> None:
    gram, cross = systems(k, m, log_condition, dtype)
    diagonal = gram.diagonal(dim1=1, dim2=2).double()
    got, failed = refine.refined_solve(gram, cross.double(), diagonal, torch.zeros(2, dtype=torch.float64))
    assert not failed.any()
    scale = diagonal.rsqrt()[..., None]  # in the units in which the diagonal is 1
    residual = scale * (cross.double() - gram.double() @ got)
    size = (scale * gram.double() * scale.mT).abs().sum(2).amax(1) * (got / scale).abs().amax((1, 2))
    assert (residual.abs().amax((1, 2)) <= 2 * k**0.5 * EPS * size).all()


def test_ridge_start_and_dead_columns(slow_fp64: None) -> None:
    gram, cross = systems(260, 2, 2.0, torch.float64)
    gram[0, 7], gram[0, :, 7] = 0.0, 0.0
    start = torch.randn_like(cross)
    for ridge in (0.0, 0.1):
        wanted = torch.linalg.solve(
            gram + torch.diag_embed((ridge * gram.diagonal(dim1=1, dim2=2).mean(1))[:, None].expand(2, 260).clone()
                                    + (gram.diagonal(dim1=1, dim2=2) == 0)),
            cross - gram @ start,
        )  # fmt: skip
        wanted[0, 7] = 0.0
        upper_is_not_read = gram.tril() + torch.full_like(gram, 9.0).triu(1)
        got, used = ops.lstsq_ex(upper_is_not_read, cross, ridge, start=start)
        assert torch.allclose(got, wanted + start, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))
        assert torch.allclose(used, ridge * gram.diagonal(dim1=1, dim2=2).mean(1))


@pytest.mark.parametrize("log_condition", [6.0, 9.0, 12.0])
def test_what_fp32_cannot_do_is_left_to_fp64(log_condition: float, slow_fp64: None) -> None:
    """Ill-conditioned systems without a small pivot, which a plain fp32 factor solves wrongly and silently."""
    gram, cross = systems(300, 1, log_condition, torch.float64)
    assert refine.refined_solve(
        gram, cross, gram.diagonal(dim1=1, dim2=2).clone(), torch.zeros(2, dtype=torch.float64)
    )[1].all()  # fmt: skip
    got = ops.lstsq(gram, cross)
    residual = (gram @ got - cross).abs().amax((1, 2))
    assert (residual <= 300 * EPS * gram.abs().sum(2).amax(1) * got.abs().amax((1, 2))).all()


def test_values_beyond_fp32(slow_fp64: None) -> None:
    gram, cross = systems(130, 1, 1.0, torch.float64)
    got = ops.lstsq(gram * 1e-60, cross * 1e-70)
    assert torch.allclose(got * 1e10, ops.lstsq(gram, cross), rtol=1e-8)
    with pytest.raises(ValueError, match="finite"):
        ops.lstsq(gram, cross * torch.nan)
    with pytest.raises(ValueError, match="not positive semidefinite"):
        ops.lstsq(-gram, cross)


def test_symmetric_product_reads_the_lower_half(slow_fp64: None) -> None:
    gram, x = systems(350, 4, 2.0, torch.float32)
    poisoned = gram.tril() + torch.full_like(gram, torch.nan).triu(1)
    got = refine.symmetric_product(poisoned, x.double())
    assert torch.allclose(got, (gram.tril() + gram.tril(-1).mT).double() @ x.double(), rtol=1e-12, atol=1e-12)


def test_a_cpu_does_not_refine() -> None:
    assert not refine.pays(torch.device("cpu"), 4096, 1)
