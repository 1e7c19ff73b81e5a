"""Sums over tokens, feature by feature: both backends against fp64."""

from __future__ import annotations

import pytest
import torch
from conftest import needs_kernels
from tolerances import FLOOR, assert_close

pytest.importorskip("triton", minversion="3.6")

from slimllm import ops
from slimllm.kernels import columns

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=["torch", pytest.param("triton", marks=needs_kernels)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SLIMLLM_BACKEND", request.param)
    return request.param


def stream(tokens: int, features: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    """Tokens whose means go up to 100 times their spread."""
    generator = torch.Generator().manual_seed(tokens + features)
    x = torch.randn(tokens, features, generator=generator) + torch.linspace(-100, 100, features)
    x = x.to(DEVICE, dtype)
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "strided":
        padded = torch.full((2 * tokens, features + 3), torch.nan, dtype=dtype, device=DEVICE)
        padded[::2, 3:] = x
        return padded[::2, 3:]
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["plain", "transposed", "strided"])
@pytest.mark.parametrize(("tokens", "features"), [(1, 1), (63, 129), (300, 130)])
def test_sums(backend: str, tokens: int, features: int, layout: str, dtype: torch.dtype) -> None:
    x = stream(tokens, features, dtype, layout)
    for pivot in (None, torch.linspace(-100, 100, features, device=DEVICE)):
        total = torch.ones(features, dtype=torch.float64, device=DEVICE)
        squares = torch.ones(2 * features, device=DEVICE)[::2]
        ops.column_sums_(total, squares, x, pivot=pivot)
        wanted_total, wanted_squares = columns.column_sums_reference(x, pivot)
        u = x.float() if pivot is None else x.float() - pivot
        scale = u.double().abs().sum(0) + 1
        assert_close(total / scale, (wanted_total + 1) / scale, (u.sum(0) + 1) / scale, FLOOR[torch.float32])
        assert_close(
            squares / (wanted_squares + 1),
            torch.ones_like(wanted_squares),
            (u.square().sum(0) + 1) / (wanted_squares + 1),
            FLOOR[torch.float32],
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["plain", "transposed", "strided"])
def test_products(backend: str, layout: str, dtype: torch.dtype) -> None:
    y, y_hat = stream(150, 131, dtype, layout), stream(150, 131, torch.float32, "plain").flip(0).to(dtype)
    centers = y.float().mean(0), y_hat.float().mean(0)
    squares, products = torch.zeros(2, 131, dtype=torch.float64, device=DEVICE)
    ops.column_products_(squares, products, y, y_hat, pivot_y=centers[0], pivot_y_hat=centers[1])
    ops.column_products_(squares, products, y[:0], y_hat[:0], pivot_y=centers[0], pivot_y_hat=centers[1])
    u, v = (t.double() - c.double() for t, c in zip((y, y_hat), centers))
    plain_u, plain_v = (t.float() - c for t, c in zip((y, y_hat), centers))
    assert_close(squares, v.square().sum(0), plain_v.square().sum(0), FLOOR[torch.float32])
    scale = (u * v).abs().sum(0)
    assert_close(products / scale, (u * v).sum(0) / scale, (plain_u * plain_v).sum(0) / scale, FLOOR[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["plain", "strided"])
def test_weights(backend: str, layout: str, dtype: torch.dtype) -> None:
    """A weight for each token; weights of 1 change nothing, a token of weight 0 may be anything finite."""
    x, x_hat = stream(150, 131, dtype, layout), stream(150, 131, dtype, "plain").flip(0)
    x[3] = 60000.0
    weight = torch.rand(150, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weight[3] = 0.0
    pivot = torch.linspace(-100, 100, 131, device=DEVICE)
    total, squares, second, products = torch.zeros(4, 131, dtype=torch.float64, device=DEVICE)
    ops.column_sums_(total, squares, x, pivot=pivot, weight=weight)
    ops.column_products_(second, products, x, x_hat, pivot_y=pivot, pivot_y_hat=pivot.flip(0), weight=weight)
    wanted_total, wanted_squares = columns.column_sums_reference(x, pivot, weight)
    u, v, w = x.double() - pivot.double(), x_hat.double() - pivot.flip(0).double(), weight.double()
    scale = w @ u.abs()
    floor = 4 * FLOOR[torch.float32]
    assert float(((total - wanted_total) / scale).abs().max()) < floor
    assert float(((squares - wanted_squares) / wanted_squares).abs().max()) < floor
    assert float(((second - w @ v.square()) / (w @ v.square())).abs().max()) < floor
    assert float(((products - w @ (u * v)) / (w @ (u * v).abs())).abs().max()) < floor
    ones, sums = torch.ones(150, device=DEVICE), torch.zeros(4, 131, dtype=torch.float64, device=DEVICE)
    ops.column_sums_(sums[0], sums[1], x_hat, pivot=pivot, weight=ones)
    ops.column_sums_(sums[2], sums[3], x_hat, pivot=pivot)
    assert torch.allclose(sums[:2], sums[2:], rtol=1e-4)


def test_split_over_tokens() -> None:
    x = stream(1000, 130, torch.float32, "plain")
    for splits in (1, 2, 7):
        total, squares = columns.column_sums(x, None, None, None, splits=splits)
        wanted_total, wanted_squares = columns.column_sums_reference(x)
        scale = x.double().abs().sum(0)
        assert_close(total / scale, wanted_total / scale, x.sum(0) / scale, FLOOR[torch.float32])
        assert_close(squares, wanted_squares, x.square().sum(0), FLOOR[torch.float32])


@pytest.mark.skipif(torch.cuda.is_available(), reason="would take 8 GiB of the GPU's memory")
def test_offsets_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    monkeypatch.setenv("SLIMLLM_BACKEND", "triton")
    x = torch.from_numpy(np.empty(2**31 + 70, dtype=np.float16)).as_strided((3, 70), (2**30, 1))
    x.copy_(torch.randn(3, 70))
    for far in (x, x[:, :3].T):
        total, squares = torch.zeros(2, far.shape[1], dtype=torch.float64)
        ops.column_sums_(total, squares, far)
        wanted_total, wanted_squares = columns.column_sums_reference(far)
        assert torch.allclose(total, wanted_total, atol=1e-5) and torch.allclose(squares, wanted_squares, rtol=1e-5)


def test_registration_and_errors() -> None:
    x, pivot = torch.randn(20, 6), torch.randn(6)
    total, squares = torch.zeros(6), torch.zeros(6)
    for operation, arguments in (
        (torch.ops.slimllm.column_sums_, (total, squares, x, pivot, None)),
        (torch.ops.slimllm.column_sums_, (total, squares, x, pivot, x[:, 0].contiguous())),
        (torch.ops.slimllm.column_products_, (total, squares, x, x, pivot, pivot, None)),
    ):
        assert set(torch.library.opcheck(operation.default, arguments).values()) == {"SUCCESS"}
    with pytest.raises(ValueError, match=r"total must have shape \(features,\) .* got \(6,\) and \(20, 5\)"):
        ops.column_sums_(total, squares, x[:, :5])
    with pytest.raises(TypeError, match="activations must be float32, float16 or bfloat16, got float64; convert it with"):
        ops.column_sums_(total, squares, x.double())
    with pytest.raises(ValueError, match="squares must have memory for every element, got an expanded tensor"):
        ops.column_sums_(total, torch.zeros(1).expand(6), x)
    with pytest.raises(ValueError, match=r"pivot must have shape \(6,\), got \(1,\)"):
        ops.column_sums_(total, squares, x, pivot=pivot[:1])
    with pytest.raises(ValueError, match=r"weight must have shape \(.*\), got \(1,\)"):
        ops.column_sums_(total, squares, x, weight=torch.ones(1))
    with pytest.raises(ValueError, match="total and squares must be two tensors"):
        ops.column_sums_(total, total, x)
    with pytest.raises(TypeError, match=r"pivot_y must be a torch\.Tensor, got NoneType"):
        ops.column_products_(total, squares, x, x, pivot_y=None, pivot_y_hat=pivot)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="y and y_hat must have one shape"):
        ops.column_products_(total, squares, x, x[:1], pivot_y=pivot, pivot_y_hat=pivot)
