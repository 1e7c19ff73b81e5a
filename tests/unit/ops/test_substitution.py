"""Halves of Cholesky solutions: every backend against fp64, and the bits whatever the number of threads."""

from __future__ import annotations

import pytest
import torch

from slimllm import ops
from slimllm.ops import dispatch
from slimllm.ops.substitution import WIDEST

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = {torch.float32: 1.2e-7, torch.float64: 2.3e-16}
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=["torch", "extension"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "extension" and dispatch.extension_is_missing(DEVICE):
        pytest.skip("the extension was not built for this device")
    monkeypatch.setenv("SLIMLLM_BACKEND", request.param)
    return str(request.param)


def systems(batch: int, k: int, m: int, dtype: torch.dtype, ridge: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlations of columns with a common part, and a ridge, as the engine solves them; and right-hand sides."""
    generator = torch.Generator().manual_seed(100 * k + m)
    x = torch.randn(batch, 2 * k + 1, k, generator=generator, dtype=torch.float64)
    x += 2 * torch.randn(batch, 2 * k + 1, 1, generator=generator, dtype=torch.float64)
    x /= x.square().mean(1, keepdim=True).sqrt()
    matrices = x.mT @ x / x.shape[1] + ridge * torch.eye(k, dtype=torch.float64)
    right = torch.randn(batch, k, m, generator=generator, dtype=torch.float64)
    return matrices.to(DEVICE, dtype), right.to(DEVICE, dtype)


def half_solved(matrices: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    solution = right.clone()
    failed = ops.half_solve_(matrices, solution)
    return solution, failed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("batch", "k", "m"),
    [(1, 1, 1), (3, 2, 5), (2, 7, 0), (5, 8, 48), (2, 33, 49), (70, 16, 3), (3, 64, 130), (2, 192, 100), (1, 257, 31)],
)
def test_against_fp64(backend: str, batch: int, k: int, m: int, dtype: torch.dtype) -> None:
    matrices, right = systems(batch, k, m, dtype)
    unread = matrices.tril() + torch.full_like(matrices, torch.nan).triu(1)  # only the lower half is read
    factor = torch.linalg.cholesky(matrices.double())
    wanted = torch.linalg.solve_triangular(factor, right.double(), upper=False)
    forms, also_failed = ops.quadratic_forms(unread, right)
    solution, failed = half_solved(unread, right)
    assert not failed.any() and not also_failed.any()
    assert solution.dtype == dtype and solution.shape == right.shape and forms.dtype == torch.float64
    bound = 20 * EPS[dtype] * float(torch.linalg.cond(matrices.double()).max()) ** 0.5 * k
    assert torch.allclose(solution.double(), wanted, rtol=0, atol=4 * bound)
    assert torch.allclose(forms, wanted.square().sum((1, 2)), rtol=bound)


def test_a_matrix_that_is_not_positive_definite_gives_nan(backend: str) -> None:
    matrices, right = systems(6, 40, 9, torch.float32)
    matrices[1, 20, 20] = -1.0
    matrices[2] = matrices[2, 0, :, None] * matrices[2, 0] * -1
    matrices[4, 39, 3] = torch.nan
    matrices[5] = 0
    matrices[3, 7, 7] = torch.inf
    bad = [1, 2, 3, 4, 5]
    for function in (half_solved, ops.quadratic_forms):
        result, failed = function(matrices, right)
        assert failed.nonzero()[:, 0].tolist() == bad
        assert bool(result[bad].isnan().all()) and bool(result[0].isfinite().all())


def test_strides_of_the_arguments(backend: str) -> None:
    matrices, right = systems(3, 24, 50, torch.float32)
    wanted = [function(matrices, right)[0] for function in (half_solved, ops.quadratic_forms)]
    among = torch.full((3, 30, 60), torch.nan, device=DEVICE)
    among[:, 3:27, 5:29] = matrices
    across = torch.full((50, 24, 3), torch.nan, device=DEVICE)
    across[:] = right.permute(2, 1, 0)
    assert torch.equal(half_solved(among[:, 3:27, 5:29], right)[0], wanted[0])
    assert torch.equal(ops.quadratic_forms(among[:, 3:27, 5:29], across.permute(2, 1, 0))[0], wanted[1])
    with pytest.raises(ValueError, match=r"right must be contiguous.*give right\.contiguous"):
        ops.half_solve_(matrices, across.permute(2, 1, 0))


def test_wide_matrices_go_to_torch(backend: str) -> None:
    matrices, right = systems(1, WIDEST[DEVICE] + 1, 3, torch.float32)
    wanted = torch.linalg.solve_triangular(torch.linalg.cholesky(matrices.double()), right.double(), upper=False)
    assert torch.allclose(half_solved(matrices, right)[0].double(), wanted, atol=1e-3)


@pytest.mark.skipif(DEVICE == "cuda", reason="threads are the CPU's")
def test_the_bits_do_not_depend_on_the_threads(backend: str) -> None:
    matrices, right = systems(9, 72, 333, torch.float32)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((half_solved(matrices, right)[0], ops.quadratic_forms(matrices, right)[0]))
    finally:
        torch.set_num_threads(before)
    if backend == "extension":
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_arguments_are_checked() -> None:
    matrices, right = systems(2, 4, 3, torch.float32)
    for function in (ops.half_solve_, ops.quadratic_forms):
        with pytest.raises(ValueError, match="a single matrix is a batch of one"):
            function(matrices[0], right[0])
        with pytest.raises(ValueError, match="must have shapes"):
            function(matrices, right[:1])
        with pytest.raises(TypeError, match="right must be float32"):
            function(matrices, right.double())
        with pytest.raises(TypeError, match="matrices must be float64 or float32"):
            function(matrices.half(), right.half())
