"""Head covariances and the greedy exchange at real shapes: the kernels against the torch path of the same run.

    python benchmarks/bench_pearson.py [--shapes llama-7b …] [--tokens 1024] [--rounds 10]

Results are checked against each other before timing. `gram` starts from the covariance of o_proj's inputs,
`stream` from the tokens, `exchange` prunes a quarter of the heads. Rows go to benchmarks/results/pearson.jsonl; on a CPU
only the torch path is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import append_results, extra_bytes, median_seconds
from rich.console import Console
from rich.table import Table
from shapes import H100, SHAPES, Shape, exchange_work, head_covariance_work, stream_work

from slimllm import ops
from slimllm.ops.registry import forced


def with_backend(name: str, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Return the function bound to one backend."""

    def run() -> torch.Tensor:
        with forced(name):
            return function()

    return run


def bench(shape: Shape, units: int, tokens: int, device: torch.device, rounds: int) -> Iterator[dict[str, Any]]:
    """Measure a row for each operation."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    width = shape.attention_width
    weight = (torch.randn(shape.hidden_size, width, generator=generator, device=device) / width**0.5).to(dtype)
    x = torch.randn(tokens, width, generator=generator, device=device).to(dtype)
    centered = x.float() - x.float().mean(0)
    covariance = centered.T @ centered / tokens
    by_head = ops.head_covariance(weight, covariance, units).double()
    pruned = max(1, units // 4)
    operations = {
        "gram": (lambda: ops.head_covariance(weight, covariance, units), head_covariance_work(shape)),
        "stream": (lambda: ops.head_covariance_of_tokens(weight, x, units, method="stream"), stream_work(shape, tokens)),
        "exchange": (lambda: ops.pearson_greedy(by_head, pruned), exchange_work(shape, pruned)),
    }
    backends = ["torch", "triton"] if device.type == "cuda" else ["torch"]
    for name, (function, work) in operations.items():
        runs: dict[str, Callable[[], Any]] = {backend: with_backend(backend, function) for backend in backends}
        results = [run().double() for run in runs.values()]
        worst = max(float((result - results[0]).abs().max() / results[0].abs().max()) for result in results)
        assert worst <= 2e-5, f"{name}: the backends differ by {worst:.1e}"  # as ops.dispatch accepts them
        seconds = median_seconds(runs, device, rounds)
        yield {
            "operation": name,
            "shape": shape.name,
            "units": units,
            "tokens": tokens,
            "seconds": seconds,
            "speedup_over_torch": seconds["torch"] / seconds[backends[-1]],
            "extra_bytes": {backend: extra_bytes(run, device) for backend, run in runs.items()},
            "result_bytes": results[0].numel() * 4,
            "floor_s_h100": max(work.floor_s(H100)),
        }


def main() -> None:
    """Measure, append the rows, print the table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = ["llama-7b", "llama-13b", "llama-33b", "llama-2-70b"] if device.type == "cuda" else ["smollm2-135m"]
    parser.add_argument("--shapes", nargs="+", default=shapes, choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    table = Table(
        "operation", "shape", "units", "torch, ms", "kernel, ms", "× torch", "extra MiB: torch, kernel", "result MiB"
    )
    for name in arguments.shapes:
        for row in bench(SHAPES[name], SHAPES[name].units, arguments.tokens, device, arguments.rounds):
            append_results("pearson", [row])
            times = [f"{1e3 * row['seconds'][b]:.3f}" if b in row["seconds"] else "" for b in ("torch", "triton")]
            extra = ", ".join(f"{size / 2**20:.0f}" for size in row["extra_bytes"].values())
            numbers = [f"{row['speedup_over_torch']:.2f}", extra, f"{row['result_bytes'] / 2**20:.0f}"]
            table.add_row(row["operation"], name, str(row["units"]), *times, *numbers)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
