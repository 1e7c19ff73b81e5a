"""Pruning of whole models: the measurements in docs/benchmarks.md. `slimllm bench` measures other models.

    python benchmarks/bench_prune.py [MODEL] [--rounds 3]   a small real model (default: the demo's), presets and recoveries
    python benchmarks/bench_prune.py --scaling              time over tokens, layers and width, with random weights
    python benchmarks/bench_prune.py --large paper best     eight layers of LLaMA-7B's sizes, for a GPU

Every run is a separate process, and settings take turns. Rows go to benchmarks/results/prune.jsonl; `make tables` makes
the tables from them.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from common import RESULTS, append_results
from rich.console import Console

import slimllm
from slimllm.cli.demo_display import find_demo_model
from slimllm.experiments.bench import Setting, measure
from slimllm.experiments.bench.display import results_table
from slimllm.experiments.bench.plot import draw
from slimllm.experiments.bench.run import read_rows

# preset, recovery, ratio
TABLE = [
    *(("paper", "affine", ratio) for ratio in (0.2, 0.5)),
    ("slimllm", "affine", 0.2),
    *(("slimllm", "lstsq", ratio) for ratio in (0.2, 0.5)),
    ("best", "lstsq", 0.2),
]
# Layers of one model, tokens of the same model, and four layers of other models.
SCALING = [
    *(Setting("smollm2-360m", layers=layers, preset="slimllm") for layers in (4, 8, 16, 32)),
    *(Setting("smollm2-360m", layers=4, preset="slimllm", samples=samples) for samples in (8, 16, 64, 128)),
    *(Setting(model, layers=4, preset="slimllm") for model in ("smollm2-135m", "tinyllama-1.1b")),
]
LARGE = {
    "paper": Setting("llama-7b", layers=8, preset="paper"),
    "slimllm": Setting("llama-7b", layers=8, preset="slimllm"),
    "lstsq": Setting("llama-7b", layers=8, preset="slimllm", recovery="lstsq"),
    "best": Setting("llama-7b", layers=8, preset="best"),
}


def as_safetensors(model: str | Path, folder: str) -> str:
    """Convert a GGUF file to a folder of bfloat16 safetensors, the usual form of a model; return a folder unchanged."""
    if Path(model).suffix != ".gguf":
        return str(model)
    loaded, tokenizer = slimllm.load(model, dtype="bfloat16")
    out = Path(folder) / Path(model).stem.split(".")[0]
    loaded.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return str(out)


def main() -> None:
    """Measure, append the rows, print the table."""
    with ExitStack() as stack:
        run(stack)


def run(stack: ExitStack) -> None:
    """Run `main`; `stack` deletes temporary files at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--large", nargs="+", choices=LARGE)
    arguments = parser.parse_args()
    if arguments.scaling or arguments.large:
        settings, rounds = SCALING if arguments.scaling else [LARGE[name] for name in arguments.large], 1
        if arguments.model:
            settings = [replace(setting, model=arguments.model, layers=None) for setting in settings]
    else:
        if (model := arguments.model or find_demo_model()) is None:
            parser.error("the demo's model is not installed; run make demo, or give a model.")
        folder = stack.enter_context(TemporaryDirectory())
        base = Setting(as_safetensors(model, folder))
        settings = [replace(base, preset=p, recovery=c, ratio=r) for p, c, r in TABLE]
        settings += [replace(base, preset=p, samples=128) for p in ("slimllm", "best")]
        settings += [replace(base, preset="slimllm", criterion="flap", allocation="flap", recovery="bias")]
        settings, rounds = settings + [replace(settings[0], model=str(model))] * (Path(model).suffix == ".gguf"), 3
    rows: list[list[dict[str, object]]] = [[] for _ in settings]
    for _ in range(arguments.rounds or rounds):
        for position, setting in enumerate(settings):
            rows[position].append(measure(setting))
            append_results("prune", rows[position][-1:])
    console = Console(width=120)
    console.print(results_table(rows))
    if arguments.scaling:
        measured = read_rows(RESULTS / "prune.jsonl")[-len(settings) :]
        draw(measured, picture := Path(__file__).parent / "scaling.png")
        console.print(f"The plot is in {picture}.", highlight=False)


if __name__ == "__main__":
    main()
