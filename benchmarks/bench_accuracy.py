"""Held-out perplexity of every method, at the same number of parameters and from the same calibration text.

    python benchmarks/bench_accuracy.py --wikitext wiki.valid.raw [MODEL]    (default: the demo's model)
    … --mha                    its copy with repeated K/V heads: the same function without grouped queries
    … --method best slimllm --ratio 0.2 0.5 --seed 0 1 2 --samples 32 128 512 --calibration bundled

The calibration text is one part of the bundled novel, or the first half of WikiText-2's validation text. The evaluation
text is another part of the novel, and the second half of the validation text. Every pruned model is evaluated on both, in
windows of 128 and of 512 tokens: the same 4,096 tokens of each text, from 8 places spread over all of it. Rows go to
benchmarks/results/accuracy.jsonl. Settings that have rows there are skipped unless `--again` is given; each takes a minute.
`make tables` makes the tables. `slimllm bench` measures the cost of pruning.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, append_results
from rich.console import Console
from transformers import PreTrainedModel

import slimllm
from slimllm.calibration import bundled_text, draw_windows, tokenize, windows_of
from slimllm.cli.demo_display import find_demo_model
from slimllm.experiments.bench.synthetic import as_mha
from slimllm.experiments.methods import METHODS

PLACES, LENGTHS = 8, (128, 512)
# Ablations: the best method with one part replaced.
PARTS: dict[str, dict[str, Any]] = {
    "best, no token weights": {"preset": "best", "token_weights": "none"},
    "best, the paper's allocation": {"preset": "best", "allocation": "layer-importance"},
    "best, the paper's criterion": {"preset": "best", "criterion": "slimllm"},
    "best, the paper's recovery": {"preset": "best", "recovery": "affine"},
}
KEYS = ("model", "mha", "method", "ratio", "calibration", "samples", "seed")


def measured(model: PreTrainedModel, texts: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the perplexity by text and window."""
    return {
        f"{name} {seq_len}": slimllm.perplexity(model, tokens, seq_len=seq_len)
        for name, tokens in texts.items()
        for seq_len in LENGTHS
    }


def places(tokens: torch.Tensor) -> torch.Tensor:
    """Return windows of the greater length, spread evenly over a text."""
    windows = windows_of(tokens, max(LENGTHS))
    return windows[torch.linspace(0, len(windows) - 1, PLACES).long()].flatten()


def there_already() -> set[tuple[Any, ...]]:
    """Return the settings that were measured already."""
    path = RESULTS / "accuracy.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {tuple(row[key] for key in KEYS) for row in rows}


def main() -> None:
    """Prune, measure, append the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=find_demo_model())
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("--mha", action="store_true")
    parser.add_argument("--method", nargs="+", default=[*METHODS, *PARTS], choices=[*METHODS, *PARTS])
    parser.add_argument("--ratio", nargs="+", type=float, default=[0.2, 0.35, 0.5])
    parser.add_argument("--calibration", nargs="+", default=["bundled", "wikitext"], choices=["bundled", "wikitext"])
    parser.add_argument("--samples", nargs="+", type=int, default=[32])
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--again", action="store_true")
    arguments = parser.parse_args()
    if arguments.model is None:
        parser.error("the demo's model is not installed; run make demo, or give a model.")
    dense, tokenizer = slimllm.load(arguments.model)
    dense = as_mha(dense) if arguments.mha else dense
    wikitext = tokenize(tokenizer, [arguments.wikitext.read_text(encoding="utf-8")])
    half = len(wikitext) // 2
    held_out = {"bundled": places(tokenize(tokenizer, [bundled_text("evaluation")])), "wikitext": places(wikitext[half:])}
    calibrating = {"bundled": tokenize(tokenizer, [bundled_text("novel")]), "wikitext": wikitext[:half]}
    console, done = Console(), set() if arguments.again else there_already()
    before = measured(dense, held_out)
    console.print("dense", before, highlight=False)
    name = getattr(Path(arguments.model), "stem", arguments.model)
    for seed in arguments.seed:
        for samples in arguments.samples:
            for text in arguments.calibration:
                windows = draw_windows(calibrating[text], samples=samples, seq_len=128, seed=seed)
                for ratio in arguments.ratio:
                    for method in arguments.method:
                        row = dict(zip(KEYS, (name, arguments.mha, method, ratio, text, samples, seed)))
                        if tuple(row.values()) in done:
                            continue
                        model = copy.deepcopy(dense)
                        config = slimllm.PruneConfig(ratio=ratio, seed=seed, **(METHODS | PARTS)[method])
                        report = slimllm.prune_model(model, windows, config)
                        row |= {
                            "perplexity": measured(model, held_out),
                            "perplexity_dense": before,
                            "seq_len": 128,
                            "achieved_ratio": report.achieved_ratio,
                            "parameters": report.parameters["layers_after"],
                        }
                        append_results("accuracy", [row])
                        values = " ".join(f"{value:.1f}" for value in row["perplexity"].values())
                        about = f"{method}, {ratio:g}, {text}, {samples} windows, seed {seed}"
                        console.print(f"{about}: {values}", highlight=False)


if __name__ == "__main__":
    main()
