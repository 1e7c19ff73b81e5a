"""Comparison of recoveries: perplexity after pruning with none, bias, lstsq and affine, on held-out text.

    python benchmarks/bench_recovery.py [MODEL] [--ratio 0.2 0.5] [--samples 32] [--seq-len 128] [--ridge 0.1 0.3 1]

The model (default: the demo's) is pruned in memory, in float32. Perplexity is measured on 64 windows of 128 tokens of the
bundled evaluation text. With --ridge, lstsq alone is measured at each of these ridges, on windows of the calibration text
that were not drawn, so that the evaluation text does not influence the choice of the ridge. Rows go to
benchmarks/results/recovery.jsonl.
"""

from __future__ import annotations

import argparse
import copy

from common import append_results
from rich.console import Console
from rich.table import Table

import slimllm
from slimllm.calibration import bundled_text, draw_windows, tokenize
from slimllm.methods.recovery import lstsq as fitting


def main() -> None:
    """Measure, append the rows, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--ratio", nargs="+", type=float, default=[0.2, 0.5])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--ridge", nargs="+", type=float, help="measure only lstsq, at these ridges")
    arguments = parser.parse_args()
    path = arguments.model
    if path is None:
        from slimllm.cli.demo_display import find_demo_model

        path = find_demo_model() or parser.error("the demo's model is not installed; run make demo, or give a model.")
    dense, tokenizer = slimllm.load(str(path), dtype="float32")
    held_out = tokenize(tokenizer, [bundled_text("evaluation")])
    if arguments.ridge:
        text = tokenize(tokenizer, [bundled_text("novel")])
        windows = draw_windows(text, samples=len(text) // arguments.seq_len, seq_len=arguments.seq_len, seed=0)
        held_out = windows[-64 * 128 // arguments.seq_len :].flatten()  # the end of the permutation that pruning draws from
    before = slimllm.perplexity(dense, held_out, max_windows=64)
    table = Table("ratio", "recovery", "perplexity", "of the dense model", "prune s / dense pass s")
    choices = [(ridge, "lstsq") for ridge in arguments.ridge or []] or [
        (None, name) for name in ("none", "bias", "lstsq", "affine")
    ]
    for ratio in arguments.ratio:
        for ridge, recovery in choices:
            fitting.RIDGE = ridge or fitting.RIDGE
            model = copy.deepcopy(dense)
            config = slimllm.PruneConfig(
                ratio, "slimllm", recovery=recovery, samples=arguments.samples, seq_len=arguments.seq_len
            )
            report = slimllm.prune_model(model, tokenizer, config)
            value = slimllm.perplexity(model, held_out, max_windows=64)
            cost = report.elapsed_s / report.dense_pass_s
            append_results(
                "recovery",
                [
                    {
                        "model": getattr(path, "stem", path),
                        "ratio": ratio,
                        "recovery": recovery,
                        "samples": arguments.samples,
                        "seq_len": arguments.seq_len,
                        "ridge": ridge,
                        "perplexity": value,
                        "perplexity_dense": before,
                        "elapsed_s": report.elapsed_s,
                        "dense_pass_s": report.dense_pass_s,
                        "achieved_ratio": report.achieved_ratio,
                    }
                ],
            )
            table.add_row(
                f"{ratio:g}",
                recovery if ridge is None else f"{recovery}, ridge {ridge:g}",
                f"{value:.2f}",
                f"{before:.2f}",
                f"{cost:.2f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
