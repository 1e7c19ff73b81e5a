"""Substitution in C++ with the vectors of instruction sets that this machine may lack, under sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from least_squares import normal_equations
from sanitizers import sanitized


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sanitized("tiles_on_host.cpp", tmp_path_factory.mktemp("tiles"), ("address,undefined",))["address,undefined"]


@pytest.mark.parametrize("bytes_of_vector", [64, 32, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("k", "m"), [(1, 1), (4, 12), (6, 65), (31, 7), (97, 130)])
def test_against_fp64(program: Path, bytes_of_vector: int, dtype: torch.dtype, k: int, m: int) -> None:
    matrix, right = (t[0] for t in normal_equations(1, k, m, condition=100.0, dtype=dtype))
    name = {torch.float32: "float", torch.float64: "double"}[dtype]
    done = subprocess.run(
        [str(program), *map(str, [bytes_of_vector, name, k, m])],
        input=b"".join(t.contiguous().numpy().tobytes() for t in (matrix, right)),
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()
    split = right.numel() * right.element_size()
    half, whole = (
        torch.from_numpy(np.frombuffer(done.stdout[at : at + split], dtype=right.numpy().dtype).reshape(k, m).copy())
        for at in (0, split)
    )
    (squares,) = np.frombuffer(done.stdout[2 * split :], dtype=np.float64)
    factor = torch.linalg.cholesky(matrix.double())
    wanted = torch.linalg.solve_triangular(factor, right.double(), upper=False)
    bound = 1e3 * k * torch.finfo(dtype).eps
    assert (half - wanted).abs().max() <= bound * wanted.abs().max()
    solution = torch.cholesky_solve(right.double(), factor)
    assert (whole - solution).abs().max() <= bound * solution.abs().max()
    assert squares == pytest.approx(float(wanted.square().sum()), rel=bound)
