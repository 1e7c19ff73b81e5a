"""Least squares: ours against torch's batched Cholesky, and the affine fit against a polynomial fit of each column.

    python benchmarks/bench_lstsq.py [--rounds 15] [--most 2048]

Results are checked against fp64 before timing. Systems are fp32; ours are factored in fp64. `torch` is
cholesky_ex and cholesky_solve in fp32, `torch fp64` the same in fp64, and `lstsq` torch.linalg.lstsq on twice as many
equations as unknowns. The affine fit has 4096 outputs and 4096 tokens. `ours` starts from the streamed moments,
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
from slimllm.ops.dispatch import choose
from slimllm.ops.lstsq import LARGEST, MOST_COLUMNS

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
    backend = choose("lstsq", device).backend if k <= LARGEST[device.type] and m <= MOST_COLUMNS else "torch"
    return {
        "what": f"{batch} systems, k = {k}, m = {m}",
        "backend": backend,
        "seconds": seconds,
        "error": error,
        "error_torch": plain,
        "speedup_over_torch": seconds["torch"] / seconds["ours"],
        "speedup_over_torch_fp64": seconds["torch fp64"] / seconds["ours"],
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
    table = Table("what", "ours, ms", "torch, ms", "× torch", "× torch fp64", "error: ours, torch")
    for shape in (shape for shape in SHAPES if shape[1] <= arguments.most):
        row = bench_systems(*shape, device, arguments.rounds)
        append_results("lstsq", [row])
        ours, torchs = (f"{1e3 * row['seconds'][name]:.3f}" for name in ("ours", "torch"))
        ratios = [f"{row[name]:.2f}" for name in ("speedup_over_torch", "speedup_over_torch_fp64")]
        table.add_row(row["what"], ours, torchs, *ratios, f"{row['error']:.0e}, {row['error_torch']:.0e}")
    row = bench_affine(device, arguments.rounds)
    append_results("lstsq", [row])
    console = Console(width=120)
    console.print(table)
    console.print(
        f"{row['what']}: {1e3 * row['seconds']['ours']:.3f} ms from the moments, {row['speedup_over_polyfit']:.0f} × "
        f"numpy's polyfit by columns; {row['speedup_over_polyfit_with_moments']:.0f} × with the moments",
        highlight=False,
    )


if __name__ == "__main__":
    main()
