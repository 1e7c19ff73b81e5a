"""Statistics about zero, and the fits through the origin that follow from them, against plain fp64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slimllm.methods.elimination import eliminate_channels
from slimllm.methods.recovery.lstsq import RIDGE, refit_kept
from slimllm.methods.surgeon import ELIMINATION_RIDGE, Surgeon
from slimllm.runtime.mapped import GramInFile
from slimllm.statistics import GramStatistics


def inputs(num_tokens: int = 400, features: int = 24, shift: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(num_tokens, features, generator=generator) @ torch.randn(features, features, generator=generator)
    return mixed / features**0.5 + shift * torch.randn(features, generator=generator)


def statistics_of(x: torch.Tensor, weight: torch.Tensor | None = None, file: Path | None = None) -> GramStatistics:
    statistics = GramInFile(x.shape[1], None, file) if file else GramStatistics(x.shape[1])
    for start in range(0, len(x), 100):
        statistics.update(x[start : start + 100], None if weight is None else weight[start : start + 100])
    return statistics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("in_file", [False, True])
def test_second_moments(dtype: torch.dtype, weighted: bool, in_file: bool, tmp_path: Path) -> None:
    x = inputs().to(dtype)
    weight = torch.rand(len(x)) if weighted else None
    mass = torch.ones(len(x)).double() if weight is None else weight.double()
    wanted = x.double().T @ (mass[:, None] * x.double()) / mass.sum()
    statistics = statistics_of(x, weight, tmp_path if in_file else None)
    mean, covariance = statistics.mean(), statistics.covariance()
    about = statistics.about_zero()
    columns = torch.tensor([3, 0, 20])
    project = torch.randn(5, x.shape[1], generator=torch.Generator().manual_seed(1))
    scale = 5e-6 * float(wanted.diagonal().max())
    assert not bool(about.mean().any())
    assert torch.allclose(about.covariance(), wanted, rtol=0, atol=scale)
    assert torch.equal(about.covariance(), about.covariance().T)
    assert torch.allclose(about.variance(), wanted.diagonal(), rtol=0, atol=scale)
    assert torch.allclose(about.rows(slice(4, 9)), wanted[4:9], rtol=0, atol=scale)
    assert torch.allclose(about.block(columns, columns[:2]), wanted[columns][:, columns[:2]], rtol=0, atol=scale)
    assert torch.allclose(about.norms(), statistics.norms(), rtol=1e-6)
    projected = project.double() @ wanted @ project.double().T
    assert torch.allclose(about.of_product(project), projected, rtol=1e-5, atol=50 * scale)
    assert torch.equal(statistics.mean(), mean) and torch.equal(statistics.covariance(), covariance)
    statistics.update(x)  # a view takes nothing from what it is a view of
    assert statistics.count == 2 * len(x)


def test_least_squares_through_the_origin() -> None:
    x, weight = inputs(), torch.randn(7, 24, generator=torch.Generator().manual_seed(1))
    keep = torch.tensor([0, 1, 4, 5, 8, 9, 13, 17, 22, 23])
    removed = torch.tensor([column for column in range(24) if column not in keep.tolist()])
    z, lost = x[:, keep].double(), x[:, removed].double() @ weight[:, removed].double().T
    size = z.square().mean(0).sqrt()
    scaled = z / size
    system = scaled.T @ scaled / len(x) + RIDGE * torch.eye(len(keep), dtype=torch.float64)
    wanted = (torch.linalg.solve(system, scaled.T @ lost / len(x)) / size[:, None]).T
    found = refit_kept(weight, statistics_of(x).about_zero(), keep)
    assert torch.allclose(found.change.delta, wanted, rtol=1e-4, atol=1e-5)
    assert found.change.intercept is not None and not bool(found.change.intercept.any())
    left = lost - z @ wanted.T
    assert found.before == pytest.approx(float(lost.square().mean(0).sum()), rel=1e-4)
    assert found.after == pytest.approx(float(left.square().mean(0).sum()), rel=1e-4)


def test_a_channel_with_a_mean_is_not_free_without_a_bias() -> None:
    """It is constant, so a bias replaces it; without one it costs most."""
    x = inputs(shift=0.0)
    x[:, 5] = 20.0 + 0.001 * x[:, 5]
    weight = torch.ones(4, 24)
    with_bias = eliminate_channels(Surgeon(weight, statistics_of(x)), 23).order.tolist()
    without = eliminate_channels(Surgeon(weight, statistics_of(x).about_zero()), 23)
    assert with_bias[0] == 5 and 5 not in without.order.tolist()
    h = x.double().T @ x.double() / len(x)
    size = h.diagonal().sqrt()
    inverse = torch.linalg.inv(h / size / size[:, None] + ELIMINATION_RIDGE * torch.eye(24, dtype=torch.float64))
    alone = (weight.double() * size).square().sum(0) / inverse.diagonal()
    assert torch.allclose(without.alone.double(), alone, rtol=1e-3)
