"""Greedy elimination among candidates: every backend against updating both matrices after every step."""

from __future__ import annotations

import pytest
import torch
from conftest import needs_kernels

pytest.importorskip("triton", minversion="3.6")

from slimllm import ops
from slimllm.kernels import elimination
from slimllm.kernels.elimination import greedy_elimination_reference
from slimllm.ops import dispatch
from slimllm.ops.elimination import LEAST

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=["torch", "extension", pytest.param("triton", marks=needs_kernels)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "extension" and (DEVICE == "cuda" or dispatch.extension_is_missing()):
        pytest.skip("the extension was not built, or does not have it for this device")
    monkeypatch.setenv("SLIMLLM_BACKEND", request.param)
    return request.param


def system(kind: str, candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A = H⁻¹ and K = V Vᵀ, (p, p) fp64, hard in one way."""
    generator = torch.Generator().manual_seed(candidates)
    x = torch.randn(5 * candidates, candidates, generator=generator, dtype=torch.float64)
    weight = torch.randn(candidates, 7, generator=generator, dtype=torch.float64)  # of lower rank than p
    if kind == "correlated":
        x = x[:, : max(1, candidates // 4)] @ torch.randn(max(1, candidates // 4), candidates, generator=generator).double()
    if kind == "twins" and candidates > 1:
        x[:, 1], weight[1] = x[:, 0], weight[0]
    if kind == "scaled":
        weight *= torch.logspace(-4, 4, candidates, dtype=torch.float64)[:, None]
    system = x.T @ x / len(x) + 0.01 * torch.eye(candidates, dtype=torch.float64)
    return torch.linalg.inv(system), weight @ weight.T


@pytest.mark.parametrize("kind", ["plain", "correlated", "twins", "scaled"])
@pytest.mark.parametrize(("candidates", "num"), [(1, 1), (5, 0), (17, 17), (48, 24), (256, 64)])
def test_the_choice_is_that_of_updating_after_every_step(backend: str, kind: str, candidates: int, num: int) -> None:
    a, k = system(kind, candidates)
    wanted, costs = greedy_elimination_reference(a, k, num, LEAST)
    chosen, got = ops.greedy_elimination(a.to(DEVICE), k.to(DEVICE), num)
    assert chosen.dtype == torch.int64 and got.dtype == torch.float64 and chosen.device == got.device == k.to(DEVICE).device
    assert got.tolist() == pytest.approx(costs, rel=1e-6, abs=1e-9 * max([1e-30, *costs]))
    if kind != "twins":  # which of two equal columns goes first is up to rounding
        assert chosen.tolist() == wanted
    assert len(set(chosen.tolist())) == num


def test_single_precision_is_computed_in_double(backend: str) -> None:
    a, k = (matrix.float().to(DEVICE) for matrix in system("plain", 40))
    chosen, costs = ops.greedy_elimination(a, k, 20)
    again, precise = ops.greedy_elimination(a.double(), k.double(), 20)
    assert torch.equal(chosen, again) and torch.equal(costs, precise)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with numpy
def test_what_is_not_a_number_is_passed_on(backend: str) -> None:
    """Every candidate is chosen once all the same, so that no index is out of range."""
    a, k = (matrix.to(DEVICE) for matrix in system("plain", 20))
    for bad in (a.clone().fill_(torch.nan), a.index_fill(0, torch.tensor([3], device=DEVICE), torch.inf)):
        chosen, costs = ops.greedy_elimination(bad, k, 20)
        assert sorted(chosen.tolist()) == list(range(20)) and not bool(costs.isfinite().all())


def test_more_candidates_than_a_program_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host chooses among them; the kernel is not called."""
    a, k = (matrix.to(DEVICE) for matrix in system("plain", 300))
    monkeypatch.setattr(elimination, "greedy_elimination", None)
    monkeypatch.setenv("SLIMLLM_BACKEND", "triton")
    assert ops.greedy_elimination(a, k, 10)[0].tolist() == greedy_elimination_reference(a.cpu(), k.cpu(), 10, LEAST)[0]
