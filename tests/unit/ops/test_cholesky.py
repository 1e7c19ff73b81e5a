"""One large system, in place: factor, inverse and solution against fp64, panel by panel."""

from __future__ import annotations

import pytest
import torch

from slimllm.ops import cholesky

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True, params=["panels", "one piece"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cholesky, "PANEL", 16)
    monkeypatch.setattr(cholesky, "NARROW", 16)
    if request.param == "panels":
        monkeypatch.setattr(cholesky, "FROM", 0)
        monkeypatch.setattr(cholesky, "_solves_in_one_piece", lambda factor: False)


def system(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Correlations and a ridge; the upper half is not read."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size // 2 + 1, size, generator=generator, dtype=torch.float64)
    x = x + torch.randn(size // 2 + 1, 1, generator=generator, dtype=torch.float64)
    x = x / x.square().mean(0).sqrt()
    whole = x.T @ x / len(x) + 0.3 * torch.eye(size, dtype=torch.float64)
    return (whole.tril() + torch.full_like(whole, torch.nan).triu(1)).to(DEVICE, dtype)


def whole(lower: torch.Tensor) -> torch.Tensor:
    return lower.double().tril() + lower.double().tril(-1).T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 48, 83])
def test_against_fp64(size: int, dtype: torch.dtype) -> None:
    given = system(size, dtype)
    a, tolerance = whole(given), 200 * size * torch.finfo(dtype).eps
    factor = given.clone()
    assert not bool(cholesky.factorise_(factor))
    wanted = torch.linalg.cholesky(a)
    assert torch.allclose(factor.double().tril(), wanted, rtol=0, atol=tolerance)
    right = torch.randn(size, 5, dtype=torch.float64).to(DEVICE, dtype)
    solution = cholesky.solve_(factor, right.clone())
    assert solution.dtype == dtype and torch.allclose(
        solution.double(), torch.linalg.solve(a, right.double()), atol=tolerance
    )
    inverse = cholesky.invert_(factor)
    assert inverse.data_ptr() == factor.data_ptr()
    assert torch.allclose(whole(inverse), torch.linalg.inv(a), rtol=0, atol=tolerance)


@pytest.mark.parametrize("where", [0, 15, 16, 40])
@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_what_is_not_positive_definite_is_never_accepted(where: int, bad: float) -> None:
    given = system(41, torch.float32)
    given[where, where] = bad
    assert bool(cholesky.factorise_(given))
    of_rank_one = torch.ones(41, 41, dtype=torch.float64, device=DEVICE)
    of_rank_one[40, 40] = 1 - 1e-6
    assert bool(cholesky.factorise_(of_rank_one))


def test_arguments_are_checked() -> None:
    square = torch.eye(4)
    with pytest.raises(ValueError, match="contiguous square matrix"):
        cholesky.factorise_(torch.ones(3, 4))
    with pytest.raises(ValueError, match="contiguous square matrix"):
        cholesky.invert_(torch.ones(4, 8)[:, ::2])
    with pytest.raises(TypeError, match="float64 or float32"):
        cholesky.factorise_(square.half())
    with pytest.raises(ValueError, match="right must be"):
        cholesky.solve_(square, torch.ones(3, 2))
