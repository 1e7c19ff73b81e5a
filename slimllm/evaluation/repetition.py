"""How much a model's continuations repeat themselves, which perplexity does not show."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from slimllm.calibration import longest_input, windows_of
from slimllm.errors import InputError
from slimllm.runtime.cores import share_cores

NGRAM = 4


@share_cores()
@torch.no_grad()
def repetition(
    model: PreTrainedModel,
    token_ids: torch.Tensor,
    *,
    continuations: int = 16,
    prompt_len: int = 64,
    new_tokens: int = 128,
    bos_token_id: int | None = None,
    batch_size: int = 8,
) -> float:
    """Measure how much greedy continuations of a text repeat themselves.

    It is seq-rep-4 of Welleck et al. (arXiv 1908.04319): the share of 4-grams of a continuation that occurred in it before,
    1 - distinct / all, averaged over continuations. It is 0 if no four tokens come twice, and nearly 1 in a loop. Prompts
    are spread evenly over the text. No token ends a continuation, and the model's own generation settings are not used.

    Args:
        model: A causal language model.
        token_ids: The text that prompts are taken from, (num_tokens,) int64.
        continuations: Number of prompts.
        prompt_len: Tokens of a prompt, with the BOS if there is one.
        new_tokens: Tokens of a continuation.
        bos_token_id: Token to put at the start of every prompt; None: nothing is added.
        batch_size: Prompts at once.

    Raises:
        ValueError: (as InputError) the text is shorter than the prompts, or a setting is out of range.
    """
    for name, value, least in (
        ("continuations", continuations, 1),
        ("prompt_len", prompt_len, 2),
        ("new_tokens", new_tokens, NGRAM),
        ("batch_size", batch_size, 1),
    ):
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}.")
    if (tokens := prompt_len + new_tokens) > (longest := longest_input(model.config)):
        raise InputError(f"A prompt and its continuation have {tokens} tokens, but the model takes at most {longest}.")
    windows = windows_of(token_ids, prompt_len, bos_token_id)
    if len(windows) < continuations:
        raise InputError(
            f"The text has {len(windows)} windows of {prompt_len} tokens, but {continuations} continuations are to begin "
            "with one each; give more text (or windows) or fewer continuations."
        )
    prompts = windows[torch.linspace(0, len(windows) - 1, continuations, dtype=torch.float64).long()]
    generating: Any = model
    own, shares = model.generation_config, []
    try:
        # The model's own settings may sample, end, or forbid what this counts.
        generating.generation_config = GenerationConfig()
        greedy = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, use_cache=True, pad_token_id=0)
        for some in prompts.to(model.device).split(batch_size):
            found = generating.generate(some, attention_mask=torch.ones_like(some), generation_config=greedy)
            shares += [_repeated(line) for line in found[:, prompt_len:].tolist()]
    finally:
        generating.generation_config = own
    return sum(shares) / len(shares)


def _repeated(tokens: list[int]) -> float:
    """Return the share of n-grams that occurred before."""
    ngrams = [tuple(tokens[start : start + NGRAM]) for start in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams)
