"""Repetition in greedy continuations, against a plain loop over the model."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from slimllm.errors import InputError
from slimllm.evaluation.repetition import repetition


def by_hand(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> float:
    ids = prompt.tolist()
    for _ in range(new_tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    new = ids[len(prompt) :]
    seen: set[tuple[int, ...]] = set()
    again = 0
    for start in range(len(new) - 3):
        ngram = tuple(new[start : start + 4])
        again += ngram in seen
        seen.add(ngram)
    return again / (len(new) - 3)


@torch.no_grad()
def test_repetition_of_a_trained_model(stories: PreTrainedModel) -> None:
    tokens = torch.randint(3, 512, (200,), generator=torch.Generator().manual_seed(0))
    prompts = [tokens[0:8], tokens[96:104], tokens[192:200]]
    wanted = sum(by_hand(stories, prompt, 40) for prompt in prompts) / 3
    found = repetition(stories, tokens, continuations=3, prompt_len=8, new_tokens=40, batch_size=2)
    assert found == pytest.approx(wanted) and 0 < found < 1


@torch.no_grad()
def test_the_settings_of_the_model_do_not_matter(stories: PreTrainedModel) -> None:
    """No token ends a continuation, not even one that the model chooses, and nothing is sampled or forbidden."""
    prompt = torch.arange(3, 11)
    wanted = repetition(stories, prompt, continuations=1, prompt_len=8, new_tokens=60)
    own = stories.generation_config
    own.repetition_penalty, own.do_sample, own.no_repeat_ngram_size = 1.5, True, 4
    own.eos_token_id = int(stories(prompt[None]).logits[0, -1].argmax())
    assert repetition(stories, prompt, continuations=1, prompt_len=8, new_tokens=60) == wanted > 0
    assert stories.generation_config is own


@torch.no_grad()
def test_a_loop_repeats_itself(stories: PreTrainedModel) -> None:
    stories.lm_head.weight.zero_()  # every logit is 0, so every token is the first
    assert repetition(stories, torch.arange(3, 11), continuations=1, prompt_len=8, new_tokens=23) == 19 / 20
    assert repetition(stories, torch.arange(3, 11), continuations=1, prompt_len=8, new_tokens=4) == 0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"continuations": 0}, "continuations must be at least 1, got 0"),
        ({"new_tokens": 3}, "new_tokens must be at least 4, got 3"),
        ({"prompt_len": 400, "new_tokens": 200}, "have 600 tokens, but the model takes at most 512"),
        ({"continuations": 5, "prompt_len": 8}, "has 4 windows of 8 tokens, but 5 continuations"),
    ],
)
def test_wrong_settings(stories: PreTrainedModel, settings: dict[str, int], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        repetition(stories, torch.arange(3, 35), **settings)
