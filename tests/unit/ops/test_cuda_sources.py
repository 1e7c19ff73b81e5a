"""The CUDA sources without a GPU: they compile for one without spills, and their solver is right when threads run it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from least_squares import normal_equations, reference
from sanitizers import sanitized
from tolerances import FLOOR, assert_close

ROOT = Path(__file__).parents[3]
CUDA_HOME = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=CUDA_HOME / "bin")


@pytest.mark.skipif(not NVCC, reason="needs nvcc")
@pytest.mark.parametrize("architecture", [pytest.param("80", marks=pytest.mark.slow), "90a"])
@pytest.mark.parametrize("source", sorted(path.name for path in (ROOT / "csrc").glob("*.cu")))
def test_they_compile_without_spills(source: str, architecture: str, tmp_path: Path) -> None:
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        pytest.skip("torch before 2.11 has no stable ABI")
    from torch.utils.cpp_extension import include_paths

    command = [str(NVCC), "-c", "-std=c++17", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xptxas=-v", "-Werror=all-warnings"]
    command += ["-Xcompiler=-Wall,-Wextra,-Werror", *(f"-isystem={folder}" for folder in include_paths())]
    command += [str(ROOT / "csrc" / source), "-o", str(tmp_path / "o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(kernels) >= 2 and set(kernels) == {("0", "0", "0")}, done.stderr  # for fp32 and for fp64


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """csrc/team.h with threads in place of a warp, under two sanitizers."""
    return sanitized("team_on_host.cpp", tmp_path_factory.mktemp("team"))


@pytest.fixture(scope="module")
def panels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """csrc/panels.h with threads in place of a block, under two sanitizers."""
    return sanitized("panels_on_host.cpp", tmp_path_factory.mktemp("panels"))


def solve(
    program: Path, threads: int, gram: torch.Tensor, cross: torch.Tensor, ridge: torch.Tensor, absolute: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the program of `team`; return solutions, ridges and statuses."""
    return called(program, threads, [gram, cross, ridge], int(absolute))


def called(
    program: Path, threads: int, tensors: list[torch.Tensor], *arguments: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run a program on matrices (batch, k, k), (batch, k, m) and others; return results like the latter, fp64 and int32."""
    cross = tensors[1]
    dtype = {torch.float32: "float", torch.float64: "double"}[cross.dtype]
    done = subprocess.run(
        [str(program), *map(str, [threads, dtype, *cross.shape, *arguments])],
        input=b"".join(t.contiguous().numpy().tobytes() for t in tensors),
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()
    split, batch = cross.numel() * cross.element_size(), len(cross)
    solution = np.frombuffer(done.stdout[:split], dtype=cross.numpy().dtype).reshape(cross.shape)
    precise = np.frombuffer(done.stdout[split : split + 8 * batch], dtype=np.float64)
    status = np.frombuffer(done.stdout[split + 8 * batch :], dtype=np.int32)
    return tuple(torch.from_numpy(array.copy()) for array in (solution, precise, status))  # type: ignore[return-value]


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("threads", "k", "m"), [(4, 1, 1), (4, 2, 3), (3, 17, 2), (4, 64, 2), (32, 33, 1)])
def test_against_fp64(team: dict[str, Path], sanitizer: str, threads: int, k: int, m: int, dtype: torch.dtype) -> None:
    gram, cross = normal_equations(3, k, m, condition=1e6, dtype=dtype)
    gram = gram.tril() + torch.full_like(gram, 7e5).triu(1)  # the lower half counts
    whole = gram.tril() + gram.tril(-1).mT
    scale = whole.diagonal(dim1=-2, dim2=-1).double().sqrt()[..., None]
    for ridge, absolute in ((0.0, False), (1e-3, False), (2.0, True)):
        ridges = torch.full((3,), ridge, dtype=torch.float64)
        solution, used, status = solve(team[sanitizer], threads, gram, cross, ridges, absolute)
        wanted = reference(whole, cross, ridges, absolute)
        assert not status.any()
        mean = whole.double().diagonal(dim1=-2, dim2=-1).mean(-1)
        assert torch.allclose(used, ridges * (torch.ones(3).double() if absolute else mean))
        assert_close(solution * scale, wanted * scale, wanted.to(dtype) * scale, 2 * FLOOR[dtype])
        if dtype == torch.float64:  # as after work in fp64, though the factor is in fp32
            left = whole + used[:, None, None] * torch.eye(k, dtype=dtype)
            assert ((left @ solution - cross) / scale).abs().max() <= 2e-13 * (left.abs() @ solution.abs() / scale).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_systems_that_scaling_does_not_help(team: dict[str, Path], dtype: torch.dtype) -> None:
    """Of condition 1e5 in any coordinates, with a solution along the weakest direction."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 33, 33, generator=generator, dtype=torch.float64))[0]
    gram = (basis * torch.logspace(0, -5, 33, dtype=torch.float64)) @ basis.mT
    gram = ((gram + gram.mT) / 2).to(dtype)
    cross = (gram.double() @ basis[:, :, -1:]).to(dtype)
    ridge = torch.zeros(6, dtype=torch.float64)
    solution, _, status = solve(team["address,undefined"], 4, gram, cross, ridge)
    assert not status.any()
    wanted = reference(gram, cross, ridge)
    assert (solution - wanted).abs().max() <= 1e5 * FLOOR[torch.float64] * 10 + torch.finfo(dtype).eps


def test_a_bad_system_says_so(team: dict[str, Path]) -> None:
    gram, cross = normal_equations(12, 9, 2)
    ridge = torch.zeros(12, dtype=torch.float64)
    gram[1] = torch.outer(gram[1, 0], gram[1, 0])  # of rank one
    gram[2, 4, 2] = torch.nan
    cross[3, 1, 1] = torch.inf
    ridge[4] = -1.0
    ridge[5] = torch.inf
    gram[6, 3, 3] = -1.0
    gram[7, 3, 3] = 0.0  # beside other numbers
    gram[8, 3], gram[8, :, 3], cross[8, 3] = 0, 0, 5.0  # a dead column
    gram[9], cross[9] = gram[9] * 1e-200, cross[9] * 1e200  # out of range
    gram[10] *= 1e-200
    cross[10] *= 1e-200
    gram[11], cross[11] = 0, 0
    solution, _, status = solve(team["address,undefined"], 4, gram, cross, ridge)
    assert status.tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 0, 0]
    assert not solution[8, 3].any() and not solution[11].any()
    alive = [i for i in range(9) if i != 3]
    assert torch.allclose(solution[8, alive], torch.linalg.solve(gram[8][alive][:, alive], cross[8, alive]))
    assert torch.allclose(solution[10], torch.linalg.solve(1e200 * gram[10], 1e200 * cross[10]))


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("threads", "k", "m"), [(4, 1, 1), (3, 31, 5), (4, 32, 64), (4, 75, 70), (2, 256, 3)])
def test_panels_against_fp64(
    panels: dict[str, Path], sanitizer: str, threads: int, k: int, m: int, dtype: torch.dtype
) -> None:
    matrices, right = normal_equations(2, k, m, condition=1e3, dtype=dtype)
    unread = matrices.tril() + torch.full_like(matrices, torch.nan).triu(1)
    solution, forms, failed = called(panels[sanitizer], threads, [unread, right])
    factor = torch.linalg.cholesky(matrices.double())
    wanted = torch.linalg.solve_triangular(factor, right.double(), upper=False)
    assert not failed.any()
    bound = 1e3 * k * torch.finfo(dtype).eps
    assert (solution - wanted).abs().max() <= bound * wanted.abs().max()
    assert torch.allclose(forms, wanted.square().sum((1, 2)), rtol=bound)


def test_panels_say_what_is_not_positive_definite(panels: dict[str, Path]) -> None:
    matrices, right = normal_equations(5, 70, 2, dtype=torch.float32)
    matrices[4, 5, 5] = torch.inf
    right[1, 69] = torch.inf
    matrices[0, 3, 3] = -1.0
    matrices[2, 69, 69] = 0.0
    matrices[3, 40, 7] = torch.nan
    solution, forms, failed = called(panels["address,undefined"], 4, [matrices, right])
    assert failed.tolist() == [1, 0, 1, 1, 1]
    assert solution[1, :69].isfinite().all() and solution[1, 69].isinf().all()  # only what follows from it
    assert forms[1] == torch.inf
