"""Least squares: ours against torch's Cholesky and numpy, and the affine fit against a polynomial fit of each column.

    python benchmarks/bench_lstsq.py [--rounds 15] [--most 2048]

Results are checked against fp64 before timing. Systems of `lstsq` are fp32; ours are factored in fp64. `torch` is
cholesky_ex and cholesky_solve in fp32, `torch fp64` the same in fp64, and `lstsq` torch.linalg.lstsq on twice as many
equations as unknowns. `heads`: tr(V A⁻¹ Vᵀ), and L⁻¹ V in place, for the heads or KV groups of a layer, in fp32;
torch is cholesky_ex and solve_triangular. `large`: one system of an FFN, factored, solved and inverted in place; torch does
not overwrite its arguments. The affine fit has 4096 outputs and 4096 tokens. `ours` starts from the streamed moments,
`ours, with the moments` from the tokens. Rows go to benchmarks/results/lstsq.jsonl.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import append_results, median_seconds
from rich.console import Console
from rich.table import Table

from slimllm import ops
from slimllm.checks import GIB
from slimllm.ops import cholesky
from slimllm.ops.dispatch import choose
from slimllm.ops.lstsq import LARGEST, MOST_COLUMNS
from slimllm.runtime import memory

# batch, unknowns, right-hand sides
SHAPES = [
    (1000, 4, 1),
    (1000, 16, 1),
    (1000, 16, 16),
    (256, 32, 8),
    (64, 64, 64),
    (16, 128, 128),
    (1, 512, 512),
    (1, 2048, 576),
]
# of the layers of SmolLM2-135M, LLaMA-7B, LLaMA-33B, and KV groups of LLaMA-3.1-8B: batch, rows, columns
HEADS = [(9, 64, 576), (32, 128, 4096), (52, 128, 6656), (8, 512, 4096)]
# FFNs of SmolLM2-135M, LLaMA-7B and LLaMA-33B, and two between: unknowns, right-hand sides at a time
LARGE = [(1536, 576), (2048, 2048), (5632, 2048), (11008, 2048), (17920, 2048)]


def bench_systems(batch: int, k: int, m: int, device: torch.device, rounds: int) -> dict[str, Any]:
    """Measure one row: a batch of systems."""
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(batch, 2 * k, k, generator=generator, device=device)
    b = torch.randn(batch, 2 * k, m, generator=generator, device=device)
    gram, cross = a.mT @ a, a.mT @ b

    def by_torch(gram: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
        return torch.cholesky_solve(cross, torch.linalg.cholesky_ex(gram)[0])

    wanted = torch.linalg.solve(gram.double(), cross.double())
    error, plain = (
        float((got.double() - wanted).abs().max() / wanted.abs().max())
        for got in (ops.lstsq(gram, cross), by_torch(gram, cross))
    )
    assert error <= 2 * plain + 1e-6, f"{batch} systems of {k}: relative error {error:.1e}, torch's {plain:.1e}"
    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: ops.lstsq(gram, cross),
        "torch": lambda: by_torch(gram, cross),
        "torch fp64": lambda: by_torch(gram.double(), cross.double()),
    }
    if batch * k * k <= 2**22:
        runs["lstsq"] = lambda: torch.linalg.lstsq(a, b).solution
    seconds = median_seconds(runs, device, rounds)
    backend = choose("lstsq", device).backend if k <= LARGEST[device.type] and m <= MOST_COLUMNS[device.type] else "torch"
    return {
        "what": f"{batch} systems, k = {k}, m = {m}",
        "backend": backend,
        "seconds": seconds,
        "error": error,
        "error_torch": plain,
        "speedup_over_torch": seconds["torch"] / seconds["ours"],
        "speedup_over_torch_fp64": seconds["torch fp64"] / seconds["ours"],
    }


def bench_heads(batch: int, k: int, m: int, device: torch.device, rounds: int) -> dict[str, Any]:
    """Measure one row: the quadratic forms and half-solutions of a layer's heads."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(batch, 2 * k, k, generator=generator, device=device)
    matrices = x.mT @ x / k + 0.01 * torch.eye(k, device=device)  # of which L⁻¹ makes nothing larger
    right = torch.randn(batch, k, m, generator=generator, device=device)
    half = torch.linalg.solve_triangular(torch.linalg.cholesky(matrices.double()), right.double(), upper=False)

    def by_torch() -> torch.Tensor:
        return torch.linalg.solve_triangular(torch.linalg.cholesky_ex(matrices)[0], right, upper=False)

    def by_numpy() -> Any:
        return np.linalg.solve(np.linalg.cholesky(matrices.cpu().numpy()), right.cpu().numpy())

    ours = right.clone()
    ops.half_solve_(matrices, ours)
    error, plain = (float((got.double() - half).abs().max() / half.abs().max()) for got in (ours, by_torch()))
    forms = ops.quadratic_forms(matrices, right)[0]
    assert error <= 2 * plain + 1e-6 and torch.allclose(forms, half.square().sum((1, 2)), rtol=1e-4)
    runs: dict[str, Callable[[], object]] = {
        "quadratic forms": lambda: ops.quadratic_forms(matrices, right),
        "quadratic forms, torch": lambda: by_torch().square().sum((1, 2)),
        "ours": lambda: ops.half_solve_(matrices, ours),  # again and again
        "torch": by_torch,
    }
    seconds = median_seconds(runs, device, rounds)
    seconds["numpy"] = median_seconds({"numpy": by_numpy}, torch.device("cpu"), 1)["numpy"]
    return {
        "what": f"heads: {batch} matrices, k = {k}, m = {m}",
        "backend": choose("half_solve_", device).backend,
        "seconds": seconds,
        "error": error,
        "error_torch": plain,
        "gflops": batch * k * k * m / seconds["quadratic forms"] / 1e9,
        "speedup_over_torch": seconds["torch"] / seconds["ours"],
        "speedup_of_forms": seconds["quadratic forms, torch"] / seconds["quadratic forms"],
    }


def bench_large(k: int, m: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Measure one row: a system of an FFN, each step once: seconds, and memory beside the arguments."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(k // 4, k, generator=generator, dtype=dtype, device=device)
    system = (x.T @ x).div_(len(x))
    system.diagonal().add_(0.3)
    del x
    right = torch.randn(k, m, generator=generator, dtype=dtype, device=device)
    seconds: dict[str, float] = {}
    extra_gib: dict[str, float] = {}

    def timed(name: str, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        memory.release()
        memory.reset_peak(device)
        before = torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else memory.resident_gib()
        started = time.perf_counter()
        found = run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - started
        peak = memory.peak_gpu_gib(device) if device.type == "cuda" else memory.peak_host_gib()
        extra_gib[name] = max(0.0, peak - before)
        return found

    factor = timed("factor, torch", lambda: torch.linalg.cholesky_ex(system)[0])
    solution = timed("solve, torch", lambda: torch.cholesky_solve(right, factor))
    inverse = timed("inverse, torch", lambda: torch.cholesky_inverse(factor))
    own, ours = system.clone(), right.clone()
    assert not bool(timed("factor", lambda: cholesky.factorise_(own)))
    timed("solve", lambda: cholesky.solve_(own, ours))
    errors = [float((system.double()[:256] @ x.double() - right[:256]).abs().max()) for x in (ours, solution)]
    timed("inverse", lambda: cholesky.invert_(own))
    assert torch.allclose(own.tril(), inverse.tril(), atol=1e-3 * float(inverse.abs().max()))
    return {
        "what": f"large: k = {k}, m = {m}, {str(dtype).removeprefix('torch.')}",
        "backend": "torch",
        "seconds": seconds,
        "extra_gib": extra_gib,
        "error": errors[0],
        "error_torch": errors[1],
        "speedup_over_torch": seconds["factor, torch"] / seconds["factor"],
        "speedup_of_solve": seconds["solve, torch"] / seconds["solve"],
        "speedup_of_inverse": seconds["inverse, torch"] / seconds["inverse"],
    }


def bench_affine(device: torch.device, rounds: int, outputs: int = 4096, tokens: int = 4096) -> dict[str, Any]:
    """Measure one row: the paper's regression of every dense output on the pruned output."""
    generator = torch.Generator(device).manual_seed(0)
    y = torch.randn(tokens, outputs, generator=generator, device=device)
    y_hat = 0.8 * y + 0.3 * torch.randn(tokens, outputs, generator=generator, device=device)

    def moments() -> tuple[torch.Tensor, ...]:
        mean_y, mean_y_hat = y.mean(0), y_hat.mean(0)
        centered = y_hat - mean_y_hat
        return mean_y, mean_y_hat, centered.square().mean(0), ((y - mean_y) * centered).mean(0)

    gathered = moments()
    columns = 64  # that the polynomial fit is timed on; its cost is the same for each
    left, right = y[:, :columns].cpu().numpy().astype(np.float64), y_hat[:, :columns].cpu().numpy().astype(np.float64)
    started = time.perf_counter()
    fits = np.array([np.polyfit(right[:, k], left[:, k], 1) for k in range(columns)])
    polyfit_s = (time.perf_counter() - started) * outputs / columns
    slope, intercept = ops.affine_fit(*gathered)
    assert np.abs(slope[:columns].cpu().numpy() - fits[:, 0]).max() < 1e-5
    assert np.abs(intercept[:columns].cpu().numpy() - fits[:, 1]).max() < 1e-5
    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: ops.affine_fit(*gathered),
        "ours, with the moments": lambda: ops.affine_fit(*moments()),
    }
    seconds = median_seconds(runs, device, rounds) | {"polyfit": polyfit_s}
    return {
        "what": f"affine fit, {outputs} outputs, {tokens} tokens",
        "seconds": seconds,
        "speedup_over_polyfit": polyfit_s / seconds["ours"],
        "speedup_over_polyfit_with_moments": polyfit_s / seconds["ours, with the moments"],
    }


def main() -> None:
    """Measure, append the rows, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--most", type=int, default=2048, help="Leave out systems of more unknowns.")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = Table("what", "ours, ms", "torch, ms", "× torch", "× torch fp64, or …", "error: ours, torch")
    for shape in (shape for shape in SHAPES if shape[1] <= arguments.most):
        row = bench_systems(*shape, device, arguments.rounds)
        append_results("lstsq", [row])
        table.add_row(*_cells(row, "ours", "torch"), f"{row['speedup_over_torch_fp64']:.2f}", _errors(row))
    for shape in (shape for shape in HEADS if shape[1] <= arguments.most):
        row = bench_heads(*shape, device, arguments.rounds)
        append_results("lstsq", [row])
        table.add_row(*_cells(row, "ours", "torch"), f"{row['speedup_of_forms']:.2f} (forms)", _errors(row))
    for k, m in (shape for shape in LARGE if shape[0] <= arguments.most):
        row = bench_large(k, m, device, torch.float32)
        append_results("lstsq", [row])
        solved = f"{row['speedup_of_solve']:.2f} (solve), {row['speedup_of_inverse']:.2f} (inverse)"
        table.add_row(*_cells(row, "factor", "factor, torch"), solved, _errors(row))
    row = bench_affine(device, arguments.rounds)
    append_results("lstsq", [row])
    console = Console(width=140)
    console.print(table)
    console.print(
        f"{row['what']}: {1e3 * row['seconds']['ours']:.3f} ms from the moments, {row['speedup_over_polyfit']:.0f} × "
        f"numpy's polyfit by columns; {row['speedup_over_polyfit_with_moments']:.0f} × with the moments",
        highlight=False,
    )


def _cells(row: dict[str, Any], ours: str, torchs: str) -> list[str]:
    times = [f"{1e3 * row['seconds'][name]:.3f}" for name in (ours, torchs)]
    return [row["what"], *times, f"{row['speedup_over_torch']:.2f}"]


def _errors(row: dict[str, Any]) -> str:
    return f"{row['error']:.0e}, {row['error_torch']:.0e}"


if __name__ == "__main__":
    main()
