"""Large solves that processes share: the factor by panels, and the elimination of channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import World, results
from torch import distributed

from slimllm.methods.elimination import eliminate_channels
from slimllm.methods.recovery.lstsq import refit_kept
from slimllm.methods.surgeon import Surgeon, surgeon_for
from slimllm.ops import cholesky
from slimllm.runtime.distributed import Ranks
from slimllm.statistics import GramStatistics


def statistics_of(features: int) -> GramStatistics:
    generator = torch.Generator().manual_seed(features)
    x = torch.randn(3 * features, features, generator=generator) @ torch.randn(features, features, generator=generator)
    statistics = GramStatistics(features)
    statistics.update(x)
    return statistics


def weight_of(features: int) -> torch.Tensor:
    return torch.randn(13, features, generator=torch.Generator().manual_seed(1))


def system_of(size: int) -> torch.Tensor:
    covariance = statistics_of(size).covariance()
    scale = covariance.diagonal().rsqrt()
    return covariance * scale[:, None] * scale + 0.3 * torch.eye(size, dtype=torch.float64)


def _factor(group: distributed.ProcessGroup, size: int, bad: int) -> list[Any]:
    cholesky.PANEL = cholesky.NARROW = 16
    system = system_of(size)
    if bad >= 0:
        system[bad, bad] = -1.0
    failed = cholesky.factorise_(system, Ranks(group))
    return [bool(failed), system.tril().tolist()]


@pytest.mark.parametrize(("ranks", "size"), [(2, 16), (2, 70), (3, 83)])
def test_a_factor_by_panels(ranks: int, size: int, tmp_path: Path) -> None:
    found = results(_factor, ranks, tmp_path / "world", size, -1)
    assert all(one == found[0] for one in found) and not found[0][0]  # to the last bit
    wanted = torch.linalg.cholesky(system_of(size))
    torch.testing.assert_close(torch.tensor(found[0][1], dtype=torch.float64), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [0, 20, 69])
def test_all_see_what_is_not_positive_definite(bad: int, tmp_path: Path) -> None:
    assert [failed for failed, _ in results(_factor, 3, tmp_path / "world", 70, bad)] == [True] * 3


def _eliminate(group: distributed.ProcessGroup, features: int, num: int, careful: bool) -> list[Any]:
    cholesky.PANEL = cholesky.NARROW = 16
    surgeon = surgeon_for(weight_of(features), statistics_of(features), Ranks(group))
    found = eliminate_channels(surgeon.again() if careful else surgeon, num)
    return [found.order.tolist(), found.costs.tolist(), found.alone.tolist()]


@pytest.mark.parametrize(("ranks", "features", "num"), [(2, 96, 96), (3, 50, 31), (3, 4, 3)])
@pytest.mark.parametrize("careful", [False, True])
def test_an_elimination(ranks: int, features: int, num: int, careful: bool, tmp_path: Path) -> None:
    """The same choice and costs as by one process, up to rounding; all of them agree to the last bit."""
    found = results(_eliminate, ranks, tmp_path / "world", features, num, careful)
    assert all(one == found[0] for one in found)
    wanted = eliminate_channels(Surgeon(weight_of(features), statistics_of(features)), num)
    order, costs, alone = found[0]
    assert order == wanted.order.tolist()
    assert costs == pytest.approx(wanted.costs.tolist(), rel=1e-3, abs=1e-5 * float(wanted.costs.sum()))
    assert alone == pytest.approx(wanted.alone.tolist(), rel=1e-3)


def _ill(group: distributed.ProcessGroup) -> None:
    statistics = statistics_of(40)
    statistics.gram.fill_(torch.nan)
    surgeon_for(weight_of(40), statistics, Ranks(group))


def test_statistics_that_are_not_finite_stop_all(tmp_path: Path) -> None:
    found = World(_ill, 2, tmp_path / "world").results()
    assert all("ill-conditioned" in one["error"] and one["error"].startswith("InputError") for one in found)


def _one_fails(group: distributed.ProcessGroup) -> Any:
    ranks = Ranks(group)

    def make() -> None:
        if ranks.rank == 1:
            raise RuntimeError("only here")
        ranks.sum_(torch.ones(3))

    return ranks.made_together(make)


def test_an_error_of_one_is_not_waited_for(tmp_path: Path) -> None:
    other, failed = World(_one_fails, 2, tmp_path / "world", seconds=5).results()
    assert "LostRankError" in other["error"] and "only here" in failed["error"]


def _without_outputs(group: distributed.ProcessGroup) -> None:
    statistics = statistics_of(40)
    statistics.gram[0, 0] = torch.nan
    refit_kept(weight_of(40)[:1], statistics, torch.arange(0, 40, 2), Ranks(group))


def test_more_processes_than_outputs(tmp_path: Path) -> None:
    found = World(_without_outputs, 3, tmp_path / "world").results()
    assert all("not finite" in one["error"] for one in found)


def _refit(group: distributed.ProcessGroup) -> list[Any]:
    cholesky.PANEL = cholesky.NARROW = 16
    refit = refit_kept(weight_of(96), statistics_of(96), torch.arange(0, 96, 2), Ranks(group))
    assert refit.change.delta is not None
    return [refit.change.delta.tolist(), refit.after]


def test_a_refit(tmp_path: Path) -> None:
    found = results(_refit, 3, tmp_path / "world")
    assert all(one == found[0] for one in found)
    wanted = refit_kept(weight_of(96), statistics_of(96), torch.arange(0, 96, 2))
    torch.testing.assert_close(torch.tensor(found[0][0], dtype=torch.float64), wanted.change.delta, rtol=1e-9, atol=1e-12)
    assert found[0][1] == pytest.approx(wanted.after, rel=1e-9)
