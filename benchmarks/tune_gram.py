"""Launch configurations of the Gram kernel on this GPU: which is fastest for every kind of input.

    python benchmarks/tune_gram.py [--features 4096] [--tokens 4096] [--rounds 10]

Results are checked against torch before timing. Rows go to benchmarks/results/tune.jsonl. Where a configuration is faster
than the shipped one by more than 3 %, the entry for CONFIGS_OF_CHIP in kernels/gram_configs.py is printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from common import append_results, median_seconds
from rich.console import Console

from slimllm import ops
from slimllm.kernels.gram_configs import CONFIGS_OF_CHIP, TMA_MAJORS, Config, config_of, kind_of
from slimllm.ops.registry import forced

# Configurations to try; one that spills is slower, and one that does not fit is left out.
WIDE = [Config(128, 64, 8, 3), Config(128, 64, 8, 4), Config(128, 128, 8, 2), Config(128, 64, 8, 2), Config(128, 32, 8, 4)]
NARROW = [Config(64, 32, 8, 2), Config(64, 32, 4, 2), Config(64, 64, 4, 2), Config(64, 16, 8, 2), Config(64, 32, 4, 3)]
FULL = [Config(64, 16, 8, 2), Config(64, 16, 4, 2), Config(64, 32, 8, 1), Config(64, 16, 8, 3), Config(64, 16, 4, 3)]
KINDS = {"tma": WIDE, "plain": WIDE, "parts": NARROW, "float": FULL}
GAIN = 0.97  # of the shipped configuration's time


@contextmanager
def configured(kind: str, config: Config) -> Iterator[None]:
    """Launch inputs of a kind with a configuration."""
    of_chip = CONFIGS_OF_CHIP.setdefault(torch.cuda.get_device_capability(), {})
    before = dict(of_chip)
    of_chip[kind] = config
    try:
        yield
    finally:
        of_chip.clear()
        of_chip.update(before)


def tune(kind: str, features: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Measure the configurations for a kind of input; those that do not compile are left out."""
    device, capability = torch.device("cuda"), torch.cuda.get_device_capability()
    generator = torch.Generator(device).manual_seed(0)
    wide = torch.randn(tokens, features + 16, generator=generator, device=device)
    x = wide if kind == "float" else wide.bfloat16()
    # For `plain`, rows that overlap, which no descriptor can have.
    x = x.as_strided((tokens, features), (features - 16, 1)) if kind == "plain" else x[:, :features]
    weight = torch.rand(tokens, generator=generator, device=device) if kind == "parts" else None
    pivot = x[0].float() if kind == "parts" else None
    gram, total = torch.zeros(features, features, device=device), torch.zeros(features, device=device)
    with forced("torch"):
        ops.gram_(wanted := torch.zeros_like(gram), torch.zeros_like(total), x, pivot=pivot, weight=weight)
    runs: dict[Config, Any] = {}
    shipped = config_of(kind, capability)
    for config in dict.fromkeys([shipped, *KINDS[kind]]):

        def run(config: Config = config) -> None:
            with configured(kind, config), forced("triton"):
                ops.gram_(gram, total, x, pivot=pivot, weight=weight)

        gram.zero_()
        try:
            run()
        except Exception as error:  # too many resources: compilers and drivers raise many types
            Console().print(f"{kind} {config}: {type(error).__name__}", highlight=False)
            continue
        if not (gram - wanted).abs().max() <= 1e-4 * wanted.abs().max():
            Console().print(f"{kind} {config}: wrong", highlight=False)
            continue
        runs[config] = run
    seconds = median_seconds({str(config): run for config, run in runs.items()}, device, rounds)
    return [
        {
            "kernel": "gram",
            "kind": kind,
            "config": [config.block_f, config.block_n, config.num_warps, config.num_stages],
            "shipped": config == shipped,
            "features": features,
            "tokens": tokens,
            "seconds": seconds[str(config)],
        }
        for config in runs
    ]


def main() -> None:
    """Measure, append the rows, print what to change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("configurations are measured on a GPU, and there is none.")
    console, capability = Console(), torch.cuda.get_device_capability()
    tma = kind_of(torch.bfloat16, False, capability[0] in TMA_MAJORS, True)
    for kind in dict.fromkeys([tma, "plain", "parts", "float"]):
        rows = tune(kind, arguments.features, arguments.tokens, arguments.rounds)
        append_results("tune", rows)
        for row in rows:
            shipped = " (shipped)" if row["shipped"] else ""
            console.print(f"{kind} {row['config']}: {1e3 * row['seconds']:.3f} ms{shipped}", highlight=False)
        best = min(rows, key=lambda row: row["seconds"], default=None)
        now = next((row for row in rows if row["shipped"]), None)
        if best and not (now and now["seconds"] * GAIN <= best["seconds"]):
            config = f"Config({', '.join(map(str, best['config']))})"
            console.print(f'CONFIGS_OF_CHIP[{capability}]["{kind}"] = {config}  # measured', highlight=False)


if __name__ == "__main__":
    main()
