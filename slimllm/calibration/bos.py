"""The beginning-of-sequence token (BOS) at the start of each window of text."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from slimllm.checkpoints.tokenizer import encode
from slimllm.checks import check_choice
from slimllm.config import BOS_CHOICES
from slimllm.errors import InputError


def window_bos(tokenizer: PreTrainedTokenizerBase, choice: str) -> int | None:
    """Return the token id that every window of a text begins with, or None.

    A model whose tokenizer puts a BOS before every text has never seen a text without one. For example, the perplexity of
    Gemma 3 270M on windows of WikiText-2 is 323 without a BOS and 32 with it.

    Args:
        tokenizer: The model's tokenizer.
        choice: `auto`: the BOS if the tokenizer itself adds one to a text. `always`: the BOS. `never`: None.

    Raises:
        ValueError: (as InputError) the choice is unknown, or it is `always` and the tokenizer has no BOS.
    """
    check_choice("bos", choice, BOS_CHOICES)
    bos: int | None = tokenizer.bos_token_id
    if choice == "never":
        return None
    if choice == "auto":
        return bos if bos is not None and encode(tokenizer, "a")[:1] == [bos] else None
    if bos is None:
        raise InputError("bos is always, but the tokenizer of this model has no BOS token; give auto or never.")
    return bos


def about_bos(bos_token_id: int | None) -> str:
    """Return a label for a perplexity that says whether its windows begin with a BOS."""
    return "no BOS" if bos_token_id is None else "with BOS"
