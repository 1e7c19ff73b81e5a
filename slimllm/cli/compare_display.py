"""Output of `slimllm compare`: a line for each method when it is done, then the table. Called by the command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from slimllm.calibration import about_bos, window_bos
from slimllm.checkpoints.destination import check_new_file
from slimllm.checkpoints.opening import open_checkpoint
from slimllm.cli.display import PruneDisplay
from slimllm.cli.options import COMMON
from slimllm.config import PruneConfig
from slimllm.evaluation.perplexity import evaluation_tokens
from slimllm.experiments.compare import Compared, compare
from slimllm.experiments.samples import with_samples


def run_compare(
    console: Console,
    model: str,
    ratios: list[float],
    config: PruneConfig,
    methods: dict[str, dict[str, Any]],
    text: str | None,
    eval_len: int,
    max_windows: int | None,
    workdir: Path | None,
    out: Path | None,
    quiet: bool,
) -> None:
    """Compare, print the table, and write the lines to `out`; arguments as on the command line.

    Raises:
        ValueError: (as InputError) as `compare`, or `out` exists or its folder does not.
    """
    check_new_file(out)
    checkpoint = open_checkpoint(model)
    tokenizer, config = checkpoint.tokenizer(), with_samples(config, methods.values(), checkpoint)
    bos_token_id = window_bos(tokenizer, config.bos)
    common = {name: value for name, value in config.to_dict().items() if name in COMMON}
    with PruneDisplay(console, quiet) as display:
        tokens = evaluation_tokens(tokenizer, text, eval_len, max_windows, config.bos)

        def on_line(line: Compared) -> None:
            where = f" at {line.ratio:g}" if line.ratio else ""
            display.say(f"{line.method}{where}: perplexity {line.perplexity:.2f}")
            if out is not None:
                with out.open("a", encoding="utf-8") as file:
                    about = {
                        "model": model,
                        "text": text or "bundled",
                        "eval_len": eval_len,
                        "max_windows": max_windows,
                        **common,
                    }
                    file.write(json.dumps({**dataclasses.asdict(line), **about}) + "\n")

        lines = compare(
            model,
            ratios,
            config,
            tokens,
            methods=methods,
            seq_len=eval_len,
            max_windows=max_windows,
            bos_token_id=bos_token_id,
            workdir=workdir,
            progress=display.progress,
            on_line=on_line,
        )
    if quiet:
        return
    console.print(compare_table(lines, eval_len))
    for name, words in {line.method: line.methods for line in lines if line.methods}.items():
        console.print(f"{name}: {words}", style="dim", highlight=False, soft_wrap=True)
    console.print(_LEGEND, style="dim", highlight=False, soft_wrap=True)


_LEGEND = (
    "log incr.: increase of the logarithm of perplexity over the dense model; s: seconds of pruning, with the dense pass "
    "even if methods share it; x dense: these seconds over one forward pass of the layers on the calibration text."
)


def compare_table(lines: list[Compared], eval_len: int) -> Table:
    """Return a table with a line for each method, best first at each ratio, below the dense model.

    Perplexities are measured in windows of `eval_len` tokens.
    """
    title = f"perplexity in windows of {eval_len} tokens, {about_bos(lines[0].bos_token_id)}"
    table = Table(box=None, padding=(0, 1), header_style="bold", title=title, title_justify="left")
    for title in ("ratio", "method", "perplexity", "log incr.", "parameters", "s", "x dense"):
        table.add_column(title, justify="left" if title == "method" else "right", no_wrap=True)
    for line in sorted(lines, key=lambda line: (line.ratio, line.perplexity)):
        cells = [
            f"{line.ratio:g}",
            line.method,
            f"{line.perplexity:.2f}",
            f"{line.log_increase:.3f}",
            f"{line.parameters:,}",
        ]
        if line.method == "dense":
            cells[0] = cells[3] = ""
        else:
            cells += [f"{line.seconds:.1f}", f"{line.seconds / line.dense_pass_s:.1f}"]
        table.add_row(*cells)
    return table
