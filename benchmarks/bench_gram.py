"""Gram of a batch at real widths: ours against torch's fastest way and against the lower bound.

    python benchmarks/bench_gram.py [--shapes llama-7b …] [--tokens 4096] [--rounds 10]

Results are checked against fp64 before timing. On a GPU, in bf16: the kernel (also about a pivot, and with
token weights), torch's product into an fp32 accumulator, and torch's plain bf16 product, whose rate is the reachable peak.
On a CPU, in fp32: the symmetric half against the whole product. Rows go to benchmarks/results/gram.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import append_results, median_seconds
from rich.console import Console
from rich.table import Table
from shapes import H100, SHAPES, gram_work

from slimllm import ops
from slimllm.ops.registry import forced


def check(x: torch.Tensor, pivot: torch.Tensor, weight: torch.Tensor) -> dict[str, float]:
    """Return relative errors against fp64 on some rows of the Gram; ours must be within twice torch's plus a floor."""
    rows = torch.randint(x.shape[1], (64,), device=x.device)
    gram = torch.empty(x.shape[1], x.shape[1], device=x.device)
    errors = {}
    total = torch.zeros(x.shape[1], device=x.device)
    for name, call in contenders(x, pivot, weight, gram, total).items():
        if name == "gemm":
            continue
        gram.zero_()
        total.zero_()
        call()
        u = x.double() - (pivot.double() if name == "ours, pivot" else 0)
        wanted = u[:, rows].T @ (u * weight.double()[:, None] if name == "ours, weight" else u)
        errors[name] = float((gram[rows].double() - wanted).abs().max() / wanted.abs().max())
        if name == "torch":
            continue
        assert torch.equal(gram, gram.T), f"{name}: the Gram is not symmetric"
        sums = (u * weight.double()[:, None] if name == "ours, weight" else u).sum(0)
        assert (total.double() - sums).abs().max() <= 1e-5 * u.abs().sum(0).max(), f"{name}: the sums are wrong"
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= 2 * errors["torch"] + 2e-5, f"the Gram is wrong: relative errors {errors}"
    return errors


def contenders(
    x: torch.Tensor, pivot: torch.Tensor, weight: torch.Tensor, gram: torch.Tensor, total: torch.Tensor
) -> dict[str, Callable[[], object]]:
    """Return the timed functions by name. Each adds the Gram of x to the fp32 accumulator, except `gemm`."""
    features = x.shape[1]
    found: dict[str, Callable[[], object]] = {"ours": lambda: ops.gram_(gram, total, x)}
    if x.device.type == "cpu":
        return found | {"torch": lambda: (gram.addmm_(x.T, x), total.add_(x.sum(0)))}
    addmm: Any = torch.addmm  # out_dtype is new in torch 2.8
    half = torch.empty(features, features, dtype=x.dtype, device=x.device)
    return found | {
        "ours, pivot": lambda: ops.gram_(gram, total, x, pivot=pivot),
        "ours, weight": lambda: ops.gram_(gram, total, x, weight=weight),
        "torch": lambda: (addmm(gram, x.T, x, out_dtype=torch.float32, out=gram), total.add_(x.sum(0))),
        "gemm": lambda: torch.mm(x.T, x, out=half),
    }


def bench(name: str, num_tokens: int, features: int, device: torch.device, rounds: int) -> dict[str, Any]:
    """Measure one row: seconds of every contender, and the derived ratios."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(num_tokens, features, generator=generator, device=device).to(dtype)
    pivot, weight = x[0].float(), torch.rand(num_tokens, generator=generator, device=device)
    errors = check(x, pivot, weight)
    gram = torch.zeros(features, features, device=device)
    seconds = median_seconds(contenders(x, pivot, weight, gram, torch.zeros_like(pivot)), device, rounds)
    work = gram_work(num_tokens, features, dtype.itemsize)
    rate = work.operations / seconds["ours"]
    row = {
        "shape": name,
        "tokens": num_tokens,
        "features": features,
        "dtype": str(dtype).removeprefix("torch."),
        "backend": ops.backend(device),
        "seconds": seconds,
        "errors": errors,
        "speedup_over_torch": seconds["torch"] / seconds["ours"],
        "tflops_of_half": rate / 1e12,
    }
    if "gemm" in seconds:
        row["of_measured_gemm_rate"] = rate / (2 * num_tokens * features**2 / seconds["gemm"])
        row["floor_s_h100"] = max(work.floor_s(H100))
    return row


def main() -> None:
    """Measure, append the rows, print the table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = device.type == "cuda"
    shapes = ["llama-7b", "llama-13b", "llama-33b", "llama-2-70b"] if gpu else ["smollm2-135m", "llama-7b"]
    parser.add_argument("--shapes", nargs="+", default=shapes, choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 16384] if gpu else [1024])
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    table = Table(
        "shape", "tokens", "features", "ours, ms", "torch, ms", "× torch", "TFLOP/s of the half", "of the GEMM rate"
    )
    with forced("triton" if gpu else "torch"):
        for name in arguments.shapes:
            shape = SHAPES[name]
            for features in (shape.hidden_size, shape.intermediate_size):
                if not gpu and features > 4096:
                    continue
                for tokens in arguments.tokens:
                    row = bench(name, tokens, features, device, arguments.rounds)
                    append_results("gram", [row])
                    ours, torchs = (f"{1e3 * row['seconds'][key]:.3f}" for key in ("ours", "torch"))
                    share = f"{row['of_measured_gemm_rate']:.2f}" if "of_measured_gemm_rate" in row else ""
                    numbers = [f"{row['speedup_over_torch']:.2f}", f"{row['tflops_of_half']:.3f}", share]
                    table.add_row(name, str(tokens), str(features), ours, torchs, *numbers)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
