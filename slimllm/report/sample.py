"""A sample of a pruned model's text, and of the dense model's if that is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from slimllm.calibration import is_unicode, longest_input, shown
from slimllm.checkpoints.tokenizer import encode
from slimllm.errors import InputError
from slimllm.evaluation.perplexity import load
from slimllm.runtime.cores import share_cores
from slimllm.runtime.memory import release

PROMPT = "The old house at the end of the street"
NEW_TOKENS = 60
REPETITION_PENALTY = 1.2


@dataclass(frozen=True)
class Sample:
    """A prompt, and its greedy continuation by each model."""

    prompt: str
    pruned: str
    dense: str | None


@share_cores()
def make_sample(
    pruned: str | Path,
    dense: str | Path | None = None,
    prompt: str = PROMPT,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Sample:
    """Continue a prompt with a pruned model, and with the dense one if it is given; one of them is in memory at a time.

    Raises:
        ValueError: (as InputError) the prompt is empty or not valid Unicode, a model cannot be loaded, or the dense one is
            not the model that was pruned.
    """
    if not prompt.strip():
        raise InputError("The prompt of the sample is empty; give some words.")
    if not is_unicode(prompt):
        raise InputError(f"The prompt of the sample, {shown(prompt)}, is not valid Unicode; give it in UTF-8.")
    after, sizes = _written(pruned, prompt, device, trust_remote_code)
    return Sample(prompt, after, None if dense is None else _written(dense, prompt, device, trust_remote_code, sizes)[0])


@torch.no_grad()
def _written(
    model: str | Path, prompt: str, device: str | None, trust_remote_code: bool, wanted: dict[str, Any] | None = None
) -> tuple[str, dict[str, Any]]:
    """Return a model's continuation of a prompt, and its sizes that pruning does not change; they must equal `wanted`."""
    loaded, tokenizer = load(model, device=device, trust_remote_code=trust_remote_code)
    sizes = {name: getattr(loaded.config, name, None) for name in ("hidden_size", "num_hidden_layers", "vocab_size")}
    for name, value in (wanted or sizes).items():
        if sizes[name] != value:
            raise InputError(f"{model} is not the model that was pruned: its {name} is {sizes[name]} instead of {value}.")
    ids = torch.tensor([encode(tokenizer, prompt)], device=loaded.device)
    longest = longest_input(loaded.config)
    if ids.shape[1] + NEW_TOKENS > longest:
        raise InputError(f"The prompt of the sample has {ids.shape[1]} tokens; give at most {longest - NEW_TOKENS}.")
    # Keep only the end-of-text token of the model's settings: others may not be greedy, or ask for code from the hub.
    loaded.generation_config = GenerationConfig(eos_token_id=getattr(loaded.generation_config, "eos_token_id", None))
    generate: Any = loaded.generate
    # Greedy, so that it is reproducible; without the penalty, small models repeat themselves, even dense ones.
    written = generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        repetition_penalty=REPETITION_PENALTY,
        pad_token_id=0,
    )
    text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    del loaded
    release()
    return str(text), sizes
