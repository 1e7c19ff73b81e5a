"""Least squares from normal equations, by torch and by the C++ extension, against fp64."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from least_squares import normal_equations, reference
from tolerances import FLOOR, assert_close

from slimllm import InputError, ops
from slimllm.ops import dispatch
from slimllm.ops.lstsq import LARGEST

LANES = 8  # systems that the extension takes side by side
NO_EXTENSION = dispatch.extension_is_missing()


@pytest.fixture(params=["torch", "extension"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "extension" and NO_EXTENSION:
        pytest.skip(f"slimllm._C {NO_EXTENSION}")
    monkeypatch.setenv("SLIMLLM_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 2, 3, 8, 17, 64, 65, 128, 129, 130])
@pytest.mark.parametrize(("batch", "m"), [(1, 1), (LANES - 1, 3), (2 * LANES - 2, 1)])
def test_against_fp64(backend: str, batch: int, k: int, m: int, dtype: torch.dtype) -> None:
    gram, cross = normal_equations(batch, k, m, dtype=dtype)
    for ridge in (0.0, 1e-2):
        ridges = torch.full((batch,), ridge, dtype=torch.float64)
        wanted = reference(gram, cross, ridges)
        plain = torch.linalg.solve(
            (gram + (ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1))[:, None, None] * torch.eye(k, dtype=dtype)), cross
        )
        got, used = ops.lstsq_ex(gram, cross, ridge)
        assert got.dtype == dtype and got.is_contiguous()
        assert torch.equal(torch.ops.slimllm.lstsq(gram, cross, ridges, False)[0], got)  # at the first attempt
        assert_close(got, wanted, plain, FLOOR[dtype])
        assert torch.allclose(used, ridges * gram.double().diagonal(dim1=-2, dim2=-1).mean(-1))


@pytest.mark.parametrize("condition", [1e0, 1e2, 1e4, 1e6, 1e8, 1e10])
def test_badly_conditioned(backend: str, condition: float) -> None:
    """Columns of very different sizes cost nothing: the systems are scaled first. The residual is that of fp64."""
    for k in (5, 30, 100):
        gram, cross = normal_equations(LANES, k, 2, condition)
        got, used = ops.lstsq_ex(gram, cross)
        assert not used.any()
        wanted = reference(gram, cross, torch.zeros(LANES, dtype=torch.float64))
        scale = gram.diagonal(dim1=-2, dim2=-1).sqrt()[..., None]
        assert_close(got * scale, wanted * scale, torch.linalg.solve(gram, cross) * scale, FLOOR[torch.float64])
        residual = (gram @ got - cross).abs() / scale
        assert residual.max() <= 1e-12 * (gram.abs() @ got.abs() / scale).max()


@pytest.mark.parametrize("batch", [1, LANES, LANES + 1])
@pytest.mark.parametrize(("k", "c"), [(16, 1.0), (64, 0.2), (129, 0.2)])
def test_fp32_systems_that_fp32_work_gets_wrong(backend: str, batch: int, k: int, c: float) -> None:
    """Of unit diagonal and condition 1e7 or so, with no small pivot to warn of it."""
    lower = torch.eye(k, dtype=torch.float64) - c * torch.ones(k, k, dtype=torch.float64).tril(-1)
    gram = lower @ lower.T
    size = gram.diagonal().rsqrt()
    gram = (gram * size[:, None] * size).float().repeat(batch, 1, 1)
    cross = torch.randn(batch, k, 2, generator=torch.Generator().manual_seed(0))
    wanted = torch.linalg.solve(gram.double(), cross.double())
    plain = torch.cholesky_solve(cross, torch.linalg.cholesky_ex(gram)[0])
    assert (plain - wanted).abs().max() > 1e-4 * wanted.abs().max()
    assert (ops.lstsq(gram, cross) - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_a_thousand_and_none(backend: str) -> None:
    gram, cross = normal_equations(1000, 16, 1)
    assert_close(
        ops.lstsq(gram, cross),
        reference(gram, cross, torch.zeros(1000, dtype=torch.float64)),
        torch.linalg.solve(gram, cross),
        FLOOR[torch.float64],
    )
    assert ops.lstsq(gram[:0], cross[:0]).shape == (0, 16, 1)
    with pytest.raises(ValueError, match="ridge must not be negative, got -1"):
        ops.lstsq(gram, cross[..., :0], -1.0)
    none, used = ops.lstsq_ex(gram, cross[..., :0], 0.5)
    assert none.shape == (1000, 16, 0)
    assert torch.allclose(used, 0.5 * gram.diagonal(dim1=-2, dim2=-1).mean(-1))
    assert ops.lstsq(gram[:, :0, :0], cross[:, :0]).shape == (1000, 0, 1)


def test_strides_and_the_half_that_is_read(backend: str) -> None:
    gram, cross = normal_equations(4 * LANES, 12, 3)
    wanted = ops.lstsq(gram, cross)
    upper = torch.full_like(gram, 7e5).triu(1)
    padded = torch.zeros(4 * LANES, 13, 12, dtype=torch.float64)
    padded[:, :12] = gram
    for other in (gram.mT.contiguous().mT, gram.tril() + upper, padded[:, :12], gram.flip(0).flip(0)):
        assert torch.equal(ops.lstsq(other, cross.mT.contiguous().mT), wanted)
    assert torch.equal(ops.lstsq(gram[::2], cross[::2]), wanted[::2])


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_absolute_and_relative_ridges(backend: str, absolute: bool, dtype: torch.dtype) -> None:
    for k in (6, 140):
        gram, cross = normal_equations(LANES, k, 4, dtype=dtype)
        ridge = torch.logspace(-3, 3, LANES, dtype=torch.float64)
        got, used = ops.lstsq_ex(gram, cross, ridge, absolute=absolute)
        wanted = reference(gram, cross, ridge, absolute)
        assert_close(got, wanted, wanted.to(dtype), 2 * FLOOR[dtype])
        assert not absolute or torch.equal(used, ridge)
        assert torch.allclose(ops.lstsq(gram, cross, 1e12), torch.zeros_like(cross), atol=1e-6)


def test_singular_systems(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    generator = torch.Generator().manual_seed(3)
    for repeat in (1, 2 * LANES - 3):
        a = torch.randn(repeat, 40, 6, generator=generator, dtype=torch.float64)
        a[..., 3] = a[..., 2]  # twice the same column
        a[..., 5] = 0  # a dead one
        b = torch.randn(repeat, 40, 2, generator=generator, dtype=torch.float64)
        gram, cross = a.mT @ a, a.mT @ b
        with caplog.at_level(logging.WARNING, "slimllm"):
            x, used = ops.lstsq_ex(gram, cross)
        assert f"{repeat} of {repeat} systems are singular" in caplog.text
        mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
        assert ((used > 0) & (used <= 1e-8 * mean)).all()
        best = torch.linalg.lstsq(a, b, driver="gelsd").solution
        assert torch.allclose(a @ x, a @ best, atol=1e-5)
        assert torch.allclose(x[:, 2], x[:, 3], atol=1e-3) and not x[:, 5].any()
        cross[:, 5] = 7.0  # which no data could give
        assert not ops.lstsq(gram, cross)[:, 5].any()
    assert not ops.lstsq(torch.zeros(9, 4, 4), torch.zeros(9, 4, 1)).any()


def test_one_bad_system_does_not_touch_the_others(backend: str) -> None:
    gram, cross = normal_equations(3 * LANES, 9, 2)
    wanted = ops.lstsq(gram, cross)
    gram[5] = torch.outer(gram[5, 0], gram[5, 0])  # of rank one
    got, used = ops.lstsq_ex(gram, cross)
    others = torch.arange(3 * LANES) != 5
    assert torch.equal(got[others], wanted[others]) and used[5] > 0 and not used[others].any()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 20), m=st.integers(1, 4), tokens=st.integers(1, 60))
def test_the_residual_is_orthogonal_to_the_columns(seed: int, k: int, m: int, tokens: int) -> None:
    """Also with fewer equations than columns."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(LANES, tokens, k, generator=generator, dtype=torch.float64)
    b = torch.randn(LANES, tokens, m, generator=generator, dtype=torch.float64)
    x = ops.lstsq(a.mT @ a, a.mT @ b, 1e-9)
    assert (a.mT @ (a @ x - b)).abs().max() <= 1e-5 * (1 + x.abs().max())


@pytest.mark.real_device
def test_registration() -> None:
    gram, cross = normal_equations(LANES, 5, 2)
    ridge = torch.zeros(LANES, dtype=torch.float64)
    for arguments in ((gram, cross, ridge, False), (gram, cross, ridge, True)):
        assert set(torch.library.opcheck(torch.ops.slimllm.lstsq.default, arguments).values()) == {"SUCCESS"}
    if not NO_EXTENSION:
        checks = ("test_schema",)
        solve = torch.ops.slimllm_C.small_lstsq.default
        assert torch.library.opcheck(solve, (gram, cross, ridge, False), test_utils=checks)
        for half in (torch.ops.slimllm_C.half_solve_.default, torch.ops.slimllm_C.quadratic_forms.default):
            assert torch.library.opcheck(half, (gram, cross), test_utils=checks)


def test_the_status_of_a_system(backend: str) -> None:
    """What torch.ops.slimllm.lstsq, which neither waits nor raises, says of what it could not solve."""
    gram, cross = normal_equations(LANES, 5, 2)
    gram[1] = torch.outer(gram[1, 0], gram[1, 0])
    gram[2, 3, 1] = torch.nan
    ridge = torch.tensor([0.0, 0, 0, -1, torch.inf, 0, 0, 0], dtype=torch.float64)
    solution, _, status = torch.ops.slimllm.lstsq(gram, cross, ridge, False)
    assert status.tolist() == [0, 1, 1, 1, 1, 0, 0, 0]
    assert solution[1:5].isnan().all() and solution[[0, 5, 6, 7]].isfinite().all()


@pytest.mark.skipif(bool(NO_EXTENSION), reason="the extension was not built")
def test_the_extension_itself_checks_what_it_is_given() -> None:
    gram, cross = normal_equations(LANES, 5, 2)
    ridge = torch.zeros(LANES, dtype=torch.float64)
    solve = torch.ops.slimllm_C.small_lstsq
    for arguments in (
        (gram[0], cross, ridge),
        (gram[:, :4], cross, ridge),
        (gram, cross[:3], ridge),
        (gram, cross.float(), ridge),
        (gram.mT.contiguous().mT, cross, ridge),
        (gram, cross, ridge.float()),
        (gram.half(), cross.half(), ridge),
    ):
        with pytest.raises(RuntimeError, match=r"must be|has the wrong|must have"):
            solve(*arguments, False)
    for half in (torch.ops.slimllm_C.half_solve_, torch.ops.slimllm_C.quadratic_forms):
        for pair in ((gram[0], cross), (gram, cross[:3]), (gram, cross.float()), (gram.half(), cross.half())):
            with pytest.raises(RuntimeError, match=r"must be|has the wrong|must have"):
                half(*pair)


def test_errors(backend: str) -> None:
    gram, cross = torch.eye(3)[None], torch.ones(1, 3, 1)
    with pytest.raises(ValueError, match=r"must have shapes .* a single system is a batch of one"):
        ops.lstsq(gram[0], cross)
    with pytest.raises(TypeError, match="cross must be float32, got float16"):
        ops.lstsq(gram, cross.half())
    with pytest.raises(TypeError, match="gram must be float64 or float32, got bfloat16"):
        ops.lstsq(gram.bfloat16(), cross.bfloat16())
    with pytest.raises(ValueError, match="ridge must not be negative, got -1"):
        ops.lstsq(gram, cross, -1.0)
    with pytest.raises(ValueError, match=r"ridge must be a number or have shape \(1,\), got \(2,\)"):
        ops.lstsq(gram, cross, torch.zeros(2))
    with pytest.raises(TypeError, match="ridge must be a number or a tensor, got str"):
        ops.lstsq(gram, cross, "much")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="absolute must be True or False, got 1"):
        ops.lstsq(gram, cross, absolute=1)  # type: ignore[arg-type]
    off = gram.clone()
    off[0, 2, 1] = torch.inf
    for name, arguments in (("gram", (gram * torch.nan, cross)), ("gram", (off, cross)), ("cross", (gram, cross / 0))):
        with pytest.raises(ValueError, match=f"{name} must be finite, got NaN or infinity"):
            ops.lstsq(*arguments)
    for size in (3, 200):
        system = torch.eye(size).repeat(LANES, 1, 1)
        system[1, 1, 1] = torch.nan
        with pytest.raises(ValueError, match="gram must be finite, got NaN or infinity"):
            ops.lstsq(system, torch.ones(LANES, size, 1), 0.1, absolute=True)
    with pytest.raises(ValueError, match=r"ridge must be finite, .*, got inf"):
        ops.lstsq(gram, cross, torch.inf)
    with pytest.raises(ValueError, match=r"leaves the range of torch\.float32"):
        ops.lstsq(1e-30 * gram, 1e20 * cross)
    with pytest.raises(ValueError, match="1 of 2 systems are not positive semidefinite: the diagonal"):
        ops.lstsq(torch.stack([torch.diag(torch.tensor([-4.0, 1.0, 1.0])), torch.eye(3)]), torch.ones(2, 3, 1))
    with pytest.raises(ValueError, match="1 of 1 systems are not positive semidefinite: the diagonal"):
        ops.lstsq(torch.tensor([[[0.0, 5.0], [5.0, 1.0]]]), torch.ones(1, 2, 1))
    for off in (1.0001, 1.5, 2.0, 5.0):
        system = torch.tensor([[[1.0, off], [off, 1.0]]]).repeat(LANES, 1, 1)
        with pytest.raises(ValueError, match=f"{LANES} of {LANES} systems are not positive semidefinite"):
            ops.lstsq(system, torch.ones(LANES, 2, 1))
    with pytest.raises(ValueError, match="ridge must be finite"):
        ops.lstsq(1e10 * gram.double(), cross.double(), 1e300)


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "extension_is_missing", lambda device_type: "was not built")
    gram, cross = normal_equations(LANES, 5, 2)
    monkeypatch.setenv("SLIMLLM_BACKEND", "auto")
    assert dispatch.choose("lstsq", "cpu") == dispatch.Choice("torch", "slimllm._C was not built")
    assert ops.lstsq(gram, cross).isfinite().all()
    monkeypatch.setenv("SLIMLLM_BACKEND", "extension")
    with pytest.raises(InputError, match=r"SLIMLLM_BACKEND=extension was asked for, but slimllm\._C was not built"):
        ops.lstsq(gram, cross)


def test_an_extension_of_an_older_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.importlib, "import_module", lambda name: None)
    monkeypatch.setattr(torch.ops, "slimllm_C", object())
    assert "older version" in dispatch.extension_is_missing.__wrapped__()


def test_what_is_used_is_named() -> None:
    assert ops.backend("cpu", ("lstsq", "gram_")) == ("torch" if NO_EXTENSION else "extension; torch for gram_")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_affine_fit(backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    y, y_hat = torch.randn(2, 200, 33, generator=generator, dtype=torch.float64)
    y_hat[:, 3] = 5.0  # constant
    mean_y, mean_y_hat = y.mean(0), y_hat.mean(0)
    variance, covariance = y_hat.var(0, correction=0), ((y - mean_y) * (y_hat - mean_y_hat)).mean(0)
    four = [t.to(dtype) for t in (mean_y, mean_y_hat, variance, covariance)]
    strided = [torch.stack([t, t], 1)[:, 0] for t in four]
    slope, intercept = ops.affine_fit(*strided)
    wanted_slope = (four[3] / four[2]).where(torch.arange(33) != 3, 1.0)
    assert slope.dtype == dtype and slope.is_contiguous()
    assert torch.equal(slope, wanted_slope) and slope[3] == 1
    assert torch.allclose(intercept.double(), (four[0] - slope * four[1]).double(), atol=10 * FLOOR[dtype])
    for k in (0, 7):
        a, b = torch.linalg.lstsq(torch.stack([y_hat[:, k], torch.ones(200)], 1), y[:, k]).solution
        assert abs(slope[k] - a) <= 10 * FLOOR[dtype] and abs(intercept[k] - b) <= 10 * FLOOR[dtype]
    assert ops.affine_fit(*(t[:0] for t in four))[0].shape == (0,)


def test_sizes_on_either_side_of_the_extension(backend: str) -> None:
    """The same result whichever of the two solves it, up to rounding."""
    for k in (LARGEST["cpu"], LARGEST["cpu"] + 1):
        gram, cross = normal_equations(LANES, k, 2)
        wanted = reference(gram, cross, torch.zeros(LANES, dtype=torch.float64))
        assert torch.allclose(ops.lstsq(gram, cross), wanted, rtol=1e-9)
