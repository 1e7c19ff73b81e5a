"""Groups of options, and examples, in the output of `--help`."""

from __future__ import annotations

from typing import Any

# The group of an option, by its parameter; the others are in "Options".
_GROUPS = {
    "How": "preset criterion allocation uniform recovery bias token_weights head_unit heads_multiple_of round_to plugin",
    "Calibration": "calibration bos samples seq_len seed",
    "Memory and device": "batch_size host_memory gpu_memory device compute_dtype",
    "Measuring": "text eval_len max_windows prompt new_tokens rounds",
    "Output": "out program dtype overwrite resume page quiet keep workdir plot",
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names.split()}
_EXAMPLES = {
    "prune": [
        "slimllm prune MODEL --out slim --ratio 0.2 --calibration your-text.txt",
        "slimllm prune MODEL --out slim --ratio 0.2 --preset slimllm",
        "slimllm prune MODEL --out slim --ratio 0.3 --for llama.cpp",
        "slimllm prune MODEL --out slim --ratio 0.2 --for vllm --host-memory 8GiB",
    ],
    "plan": ["slimllm plan MODEL --ratio 0.2 --host-memory 8GiB", "slimllm plan llama-33b --device cuda --gpu-memory 8GiB"],
    "export": ["slimllm export slim --to gguf --out slim.gguf", "slimllm export slim --to padded --out padded"],
    "compare": [
        "slimllm compare MODEL --ratio 0.2 --method slimllm --method best --method flap",
        "slimllm compare MODEL --plugin my_score.py --method my-score --method my-score+affine",
    ],
    "sweep": ["slimllm sweep MODEL --ratio 0.1:0.6:0.1 --preset best --preset slimllm"],
    "bench": ["slimllm bench llama-7b --layers 2 --preset slimllm --recovery affine --recovery lstsq --rounds 3"],
}


def set_groups(command: Any) -> None:
    """Put the options of a command into their groups."""
    for parameter in command.params:
        if parameter.param_type_name == "option" and parameter.name in _GROUP_OF:
            parameter.rich_help_panel = _GROUP_OF[parameter.name]


def epilog(name: str, options: list[str]) -> str:
    """Return the text after the options: the options of methods, and examples."""
    lines = ["Options of methods:", *options] if options else []
    if examples := _EXAMPLES.get(name):
        lines += ["Examples:", *examples]
    return "\n\n".join(lines)
