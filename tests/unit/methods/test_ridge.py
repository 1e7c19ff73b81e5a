"""The system of a ridge regression, in fp64 and in fp32 with refinement."""

from __future__ import annotations

import pytest
import torch

from slimllm.errors import InputError
from slimllm.methods import ridge
from slimllm.methods.recovery.lstsq import refit_kept
from slimllm.methods.ridge import RidgeSystem, column_scale
from slimllm.statistics import GramStatistics


def statistics_of(kind: str, features: int = 300) -> GramStatistics:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, features, generator=generator)
    if kind == "common":  # one direction has nearly all variance: the largest condition number
        x = x * 1e-3 + torch.randn(500, 1, generator=generator)
    if kind == "scaled":
        x = x * torch.logspace(-4, 3, features) + 5
    if kind == "dead":
        x[:, ::7] = 3.0
    statistics = GramStatistics(features)
    statistics.update(x)
    return statistics


@pytest.mark.parametrize("kind", ["plain", "common", "scaled", "dead"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_solutions_against_fp64(kind: str, dtype: torch.dtype) -> None:
    statistics = statistics_of(kind)
    columns = torch.arange(0, 300, 2)
    found = RidgeSystem(statistics, columns, 0.3, dtype)
    covariance = statistics.covariance()[columns][:, columns]
    scale = column_scale(statistics.variance(), statistics.mean())[columns]
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    whole = covariance * inverse[:, None] * inverse + 0.3 * torch.eye(150, dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(whole)
    assert eigenvalues[0] >= 0.3 - 1e-3 and eigenvalues[-1] <= 0.301 + 150  # the bounds of the condition number
    right = torch.randn(150, 20, dtype=torch.float64)
    wanted = torch.linalg.solve(whole, right)
    error = (found.solve(right) - wanted).norm() / wanted.norm()
    assert error <= (1e-12 if dtype == torch.float64 else 1e-9)
    assert found.dtype == dtype  # it was not factored again


def test_a_solution_in_fp32_that_is_not_good_enough_is_made_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics, right = statistics_of("common"), torch.randn(300, 3, dtype=torch.float64)
    wanted = RidgeSystem(statistics, None, 0.3).solve(right)
    found = RidgeSystem(statistics, None, 0.3, torch.float32)
    found.matrix.mul_(1.01)  # as if it had been computed badly
    assert torch.allclose(found.solve(right), wanted, rtol=1e-12) and found.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_statistics_that_are_not_finite_are_an_error(dtype: torch.dtype) -> None:
    statistics = statistics_of("plain")
    statistics.gram[7, 9] = statistics.gram[9, 7] = torch.inf
    with pytest.raises(InputError, match="not finite"):
        RidgeSystem(statistics, None, 0.3, dtype).solve(torch.ones(300, 1, dtype=torch.float64))


@pytest.mark.parametrize("where", [(0, 1), (1, 1), (0, 3)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_refit_of_statistics_that_are_not_finite_is_an_error(
    where: tuple[int, int], bad: float, dtype: torch.dtype
) -> None:
    """Of kept columns, of removed ones, or between them."""
    statistics, keep = statistics_of("plain"), torch.arange(0, 300, 3)
    statistics.gram[where] = statistics.gram[where[::-1]] = bad
    with pytest.raises(InputError, match="not finite"):
        refit_kept(torch.randn(4, 300), statistics, keep, dtype=dtype)
    weight = torch.randn(4, 300)
    weight[2, 1] = bad
    with pytest.raises(InputError, match="not finite"):
        refit_kept(weight, statistics_of("plain"), keep, dtype=dtype)


def test_shares_and_precisions_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refit of all outputs at once, of a few at a time, and with a factor in fp32."""
    statistics, weight, keep = statistics_of("scaled"), torch.randn(40, 300), torch.arange(0, 300, 3)
    wanted = refit_kept(weight, statistics, keep)
    single = refit_kept(weight, statistics, keep, dtype=torch.float32)
    monkeypatch.setattr("slimllm.methods.recovery.lstsq.OUTPUTS", 7)
    monkeypatch.setattr("slimllm.methods.recovery.lstsq.ROWS", 13)
    monkeypatch.setattr(ridge, "_ROWS", 11)
    parts = refit_kept(weight, statistics, keep)
    for other, tolerance in ((single, 1e-8), (parts, 1e-11)):
        assert other.before == pytest.approx(wanted.before) and other.after == pytest.approx(wanted.after, rel=1e-6)
        for name in ("delta", "intercept"):
            got, expected = getattr(other.change, name), getattr(wanted.change, name)
            assert (got - expected).norm() <= tolerance * expected.norm()
