"""The README.md inside a pruned checkpoint: how it was made, and how to load it."""

from __future__ import annotations

import re
from pathlib import Path

from slimllm.models.families import CONTAINERS
from slimllm.pruning.report import PruneReport
from slimllm.pruning.tensor_parallel import tensor_parallel_of


def in_line(text: str) -> str:
    """Escape a user's text for use within one line of Markdown."""
    # Bytes that are not text are kept here, and written as escapes later.
    plain = "".join(one if one.isprintable() or "\ud800" <= one <= "\udfff" else " " for one in text)
    return re.sub(r"([\\`*_{}\[\]<>#|~&!$])", r"\\\1", plain)


def in_block(text: str) -> str:
    """Format a user's text as a Markdown code block, with a fence longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def write_model_card(report: PruneReport, folder: Path, command: str) -> None:
    """Write README.md. Nothing in it depends on the clock, so the same run writes the same file."""
    parameters, calibration = report.parameters, report.calibration
    native = report.format.startswith("slim_")
    loading = (
        "No architecture of transformers itself fits its layers, so the folder contains two short modeling files:"
        if native
        else f"It is a stock `{report.format}` model and needs no custom code:"
    )
    inside = report.format in CONTAINERS
    kind = "AutoModelForImageTextToText" if inside else "AutoModelForCausalLM"
    trust = ", trust_remote_code=True" if native else ""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    notes = "".join(f"- {note}\n" for note in report.allocation["notes"]) + "\n" * bool(report.allocation["notes"])
    name = Path(report.model).name
    by_paper = report.config["criterion"] == "slimllm"
    paper = ", with the criterion of [SlimLLM](https://arxiv.org/abs/2505.22689)" if by_paper else ""
    title, text_name = in_line(name.removesuffix(".gguf")), in_line(calibration["text"])
    text = f"""---
library_name: transformers
pipeline_tag: {"image-text-to-text" if inside else "text-generation"}
tags:
- slimllm
- pruned
---

# {title}, pruned by {report.achieved_ratio:.1%}

Structurally pruned with `slimllm-engine`{paper}: whole attention heads and whole
FFN channels are removed, by {report.methods}.{" Only the language model was pruned." if inside else ""}

| | before | after | removed |
|---|---|---|---|
| parameters | {parameters["before"]:,} | {parameters["after"]:,} | {report.achieved_ratio_model:.2%} |
| of the decoder layers | {parameters["layers_before"]:,} | {parameters["layers_after"]:,} | {report.achieved_ratio:.2%} |
| perplexity on {report.judged_by} | {calibration["perplexity_dense"]:.2f} | {calibration["perplexity_pruned"]:.2f} | |

Calibration: {text_name}, {calibration["samples"]} x {calibration["seq_len"]} tokens, {calibration["bos"]},
seed {report.config["seed"]}. On other kinds of text the perplexity rises more; measure it on your own text with
`slimllm eval`.

{loading}

```python
from transformers import {kind}, AutoTokenizer

model = {kind}.from_pretrained("PATH"{trust})
tokenizer = AutoTokenizer.from_pretrained("PATH"{trust})
```

{tensor_parallel_of(report).capitalize()} (numbers of GPUs over which vLLM can split every layer).

Made from {in_line(name)} by

{in_block(command)}

{notes}Versions: {versions}. Computed in {report.compute_dtype} on {report.device}. Everything per layer is in `report.json`.
"""
    # A path may hold bytes that are not UTF-8.
    (folder / "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")
