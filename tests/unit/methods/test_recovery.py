from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimllm.methods.moments import OutputMoments, unit_moments
from slimllm.methods.recovery.lstsq import RIDGE, RIDGE_OF_FEW, Refit, refit_kept
from slimllm.methods.ridge import MEAN_PART
from slimllm.ops import head_covariance
from slimllm.statistics import GramStatistics, mean_output


def moments_of(y: torch.Tensor, y_hat: torch.Tensor) -> OutputMoments:
    y, y_hat = y.double(), y_hat.double()
    centered, centered_hat = y - y.mean(0), y_hat - y_hat.mean(0)
    return OutputMoments(
        y.mean(0),
        y_hat.mean(0),
        centered.square().mean(0),
        centered_hat.square().mean(0),
        (centered * centered_hat).mean(0),
    )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), tokens=st.integers(3, 100), features=st.integers(1, 12))
def test_residual_is_orthogonal_to_its_inputs(seed: int, tokens: int, features: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    y_hat = torch.randn(tokens, features, generator=generator, dtype=torch.float64) + 3
    y = torch.randn(tokens, features, generator=generator, dtype=torch.float64) + y_hat
    moments = moments_of(y, y_hat)
    slope, intercept = moments.affine_fit()
    residual = y - slope * y_hat - intercept
    assert residual.mean(0).abs().max() <= 1e-9
    assert (residual * y_hat).mean(0).abs().max() <= 1e-8
    measured = residual.square().mean(0).sum() / (y - y.mean(0)).square().mean(0).sum()
    assert abs(moments.relative_error(slope, intercept) - float(measured)) <= 1e-9
    ones, zeros = torch.ones(features).double(), torch.zeros(features).double()
    assert moments.relative_error(slope, intercept) <= moments.relative_error(ones, zeros) + 1e-12


def test_constant_prediction_keeps_slope_one_and_meets_the_mean() -> None:
    y = torch.randn(50, 2) + 4
    y_hat = torch.tensor([7.0, 0.0]).expand(50, 2)
    slope, intercept = moments_of(y, y_hat).affine_fit()
    assert slope.tolist() == [1.0, 1.0]
    assert torch.allclose(slope * y_hat[0] + intercept, y.double().mean(0))


def test_perfect_prediction_is_left_alone() -> None:
    y = torch.randn(50, 3)
    slope, intercept = moments_of(y, y).affine_fit()
    assert torch.allclose(slope, torch.ones(3).double()) and intercept.abs().max() < 1e-12


def test_moments_of_units_are_those_of_the_outputs() -> None:
    x, weight = torch.randn(300, 12) + 2, torch.randn(7, 12)
    keep = torch.tensor([0, 2])
    statistics = GramStatistics(12)
    statistics.update(x)
    covariance = head_covariance(weight, statistics.covariance(), 4)
    means = (weight.double().view(7, 4, 3) * statistics.mean().view(4, 3)).sum(-1).T
    got = unit_moments(covariance, means, keep)
    outputs = torch.einsum("nhd,khd->nkh", x.double().view(300, 4, 3), weight.double().view(7, 4, 3))
    wanted = moments_of(outputs.sum(-1), outputs[..., keep].sum(-1))
    for name in ("mean_y", "mean_y_hat", "variance_y", "variance_y_hat", "covariance"):
        assert torch.allclose(getattr(got, name), getattr(wanted, name), rtol=1e-4, atol=1e-5), name


def refit_of(z: torch.Tensor, lost: torch.Tensor) -> Refit:
    """Refit the columns z to an output that is lost with other columns, one for each dimension."""
    statistics = GramStatistics(z.shape[1] + lost.shape[1])
    statistics.update(torch.cat([z, lost], 1).float())
    weight = torch.cat([torch.zeros(lost.shape[1], z.shape[1]), torch.eye(lost.shape[1])], 1)
    return refit_kept(weight, statistics, torch.arange(z.shape[1]))


def ridge_regression(z: torch.Tensor, lost: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the coefficients of scaled columns and the error left, from the tokens, by rows that ask for 0."""
    z, lost = z.double(), lost.double()
    centered, centered_lost = z - z.mean(0), lost - lost.mean(0)
    variance = centered.square().mean(0)
    size = torch.where(variance > 0, variance + MEAN_PART * z.mean(0).square(), 0.0).sqrt()
    scaled = torch.where(size > 0, centered / size, 0.0)
    rows = torch.cat([scaled, (ridge * len(z)) ** 0.5 * torch.eye(z.shape[1], dtype=torch.float64)])
    zeros = torch.zeros(z.shape[1], lost.shape[1], dtype=torch.float64)
    found = torch.linalg.lstsq(rows, torch.cat([centered_lost, zeros])).solution
    found = torch.where(size[:, None] > 0, found / size[:, None], 0.0)
    return found, (centered_lost - centered @ found).square().mean(0).sum()


@pytest.mark.parametrize("tokens", [7, 300])
@pytest.mark.parametrize("dead", [False, True])
def test_least_squares_is_ridge_regression_on_scaled_columns(tokens: int, dead: bool) -> None:
    """Against the regression on the tokens themselves, also with fewer of them than columns, and dead columns."""
    generator = torch.Generator().manual_seed(tokens)
    z = (torch.randn(tokens, 20, generator=generator) * torch.logspace(-2, 2, 20) + 50).float()
    if dead:
        z[:, 3] = 7.0
    lost = torch.randn(tokens, 4, generator=generator) + 0.1 * (z[:, :4] - 50)
    refit = refit_of(z, lost)
    wanted, missing = ridge_regression(z, lost, RIDGE if tokens == 300 else RIDGE_OF_FEW)
    assert refit.change.delta is not None and refit.change.intercept is not None
    size = z.double().std(0, correction=0)  # of the effect on an output
    assert torch.allclose(refit.change.delta.T * size[:, None], wanted * size[:, None], rtol=1e-4, atol=1e-5)
    intercept = lost.double().mean(0) - z.double().mean(0) @ wanted
    assert torch.allclose(refit.change.intercept, intercept, rtol=1e-4, atol=1e-3)
    assert refit.after == pytest.approx(float(missing), rel=1e-4)


@pytest.mark.parametrize("spread", [1e-6, 1e-4, 1e-2, 1.0])
def test_nearly_constant_columns_survive_rounding(spread: float) -> None:
    """Weights and bias rounded to bf16 leave the error that was reported, nearly."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(500, 40, generator=generator, dtype=torch.float64)
    z[:, :4] = spread * z[:, :4] + torch.tensor([1.0, 2.0, 3.0, 4.0])
    lost = torch.randn(500, 10, generator=generator, dtype=torch.float64) + z[:, 10:20]
    refit = refit_of(z, lost)
    delta, intercept = (t.bfloat16().double() for t in (refit.change.delta, refit.change.intercept))
    real = (lost - z @ delta.T - intercept).square().mean(0).sum()
    assert real <= 1.02 * refit.after + 1e-3


def test_refit_is_least_squares_of_what_was_removed() -> None:
    """From one Gram, against the regression of the removed columns' output, made from the tokens."""
    generator = torch.Generator().manual_seed(0)
    z, weight = torch.randn(400, 60, generator=generator) + 2, torch.randn(9, 60, generator=generator)
    z[:, 30:] += z[:, :30]  # what is removed has something in common with what is kept
    keep = torch.arange(0, 60, 2)
    gone = torch.arange(1, 60, 2)
    statistics = GramStatistics(60)
    statistics.update(z)
    refit = refit_kept(weight, statistics, keep)
    kept, lost = z[:, keep].double(), z[:, gone].double() @ weight[:, gone].double().T
    wanted, missing = ridge_regression(kept, lost, RIDGE)
    assert torch.allclose(refit.change.delta.T, wanted, rtol=1e-4, atol=1e-6)
    assert torch.allclose(refit.change.intercept, lost.mean(0) - kept.mean(0) @ wanted, rtol=1e-4, atol=1e-4)
    assert refit.after == pytest.approx(float(missing), rel=1e-4)
    assert refit.before == pytest.approx(float(lost.square().mean(0).sum()), rel=1e-4)
    left = lost - kept @ refit.change.delta.T - refit.change.intercept
    assert float(left.square().mean(0).sum()) == pytest.approx(refit.after, rel=1e-3) and refit.after < refit.before


def test_mean_output_by_heads() -> None:
    weight, mean = torch.randn(700, 24).bfloat16(), torch.randn(24, dtype=torch.float64)
    wanted = torch.einsum("khd,hd->hk", weight.double().view(700, 4, 6), mean.view(4, 6))
    assert torch.allclose(mean_output(weight, mean, 4), wanted, rtol=1e-12)
    assert torch.allclose(mean_output(weight, mean)[0], weight.double() @ mean, rtol=1e-12)


@pytest.mark.parametrize(("tokens", "ridge"), [(20, RIDGE_OF_FEW), (79, RIDGE_OF_FEW), (80, RIDGE), (200, RIDGE)])
def test_the_ridge_is_stronger_where_there_are_few_tokens(tokens: int, ridge: float) -> None:
    """Fewer than two for each of the 40 columns."""
    generator = torch.Generator().manual_seed(0)
    z, weight = torch.randn(tokens, 40, generator=generator), torch.randn(6, 40, generator=generator)
    statistics, keep = GramStatistics(40), torch.arange(0, 40, 2)
    statistics.update(z)
    u = z.double() - z.double().mean(0)
    lost = u[:, 1::2] @ weight[:, 1::2].double().T
    size = (u.square().mean(0) + MEAN_PART * z.double().mean(0).square()).sqrt()[keep]
    system = (u[:, keep] / size).T @ (u[:, keep] / size) / tokens + ridge * torch.eye(20, dtype=torch.float64)
    wanted = torch.linalg.solve(system, (u[:, keep] / size).T @ lost / tokens) / size[:, None]
    change = refit_kept(weight, statistics, keep).change
    assert change.delta is not None and torch.allclose(change.delta.T, wanted, rtol=1e-3, atol=1e-5)
