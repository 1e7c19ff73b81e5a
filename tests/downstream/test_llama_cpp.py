"""GGUF exports in llama.cpp itself, through the package xllamacpp (`make test-llama-cpp` installs it)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORIES, config, logits, random_llama
from tiny_models import saved, tiny
from transformers import AutoTokenizer

import slimllm
from slimllm.calibration import bundled_text, draw_windows, tokenize
from slimllm.cli.demo_display import find_demo_model
from slimllm.export.api import export

xllamacpp: Any = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed; make test-llama-cpp does that")
pytestmark = pytest.mark.slow
TEXT = "Once upon a time there were 1234 dogs. They didn't like 3.14 cats, naïve café! And\n\n  so the big dog said: hello"


def server(path: Path) -> Any:
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel, parameters.warmup = str(path), 256, 1, False
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(parameters)


def completion(at: Any, prompt: str | list[int], number: int) -> tuple[int, list[dict[str, Any]]]:
    """Tokens of the prompt, and the most likely next ones; none where the first is no text: an end, or a single byte."""
    settings = {"prompt": prompt, "n_predict": 1, "logprobs": number, "temperature": 0.0, "cache_prompt": False}
    answer = at.handle_completions(settings)
    logprobs = answer["choices"][0]["logprobs"]
    return answer["usage"]["prompt_tokens"], logprobs["content"][0]["top_logprobs"] if logprobs else []


def assert_the_same(folder: Path, file: Path) -> None:
    """The probability of every token of the vocabulary as the next one, and how a text is cut into tokens."""
    model, tokenizer = slimllm.load(folder)
    ids = tokenizer(TEXT)["input_ids"]
    at, vocabulary = server(file), model.config.vocab_size
    wanted = logits(model, torch.tensor([ids]))[0].double().log_softmax(-1)
    compared = 0
    for length in range(2, len(ids) + 1, 5):
        _, top = completion(at, ids[:length], vocabulary)
        if not top:
            assert tokenizer.convert_ids_to_tokens(int(wanted[length - 1].argmax())).startswith("<")
            continue
        assert len(top) == vocabulary
        compared += 1
        found = torch.empty(vocabulary, dtype=torch.float64)
        found[[one["id"] for one in top]] = torch.tensor([one["logprob"] for one in top], dtype=torch.float64)
        assert torch.allclose(found, wanted[length - 1], rtol=0, atol=1e-3)
    assert compared >= 4
    (number, as_text), (_, as_tokens) = (completion(at, prompt, 8) for prompt in (TEXT, ids))
    assert number == len(ids) and len(as_text) == len(as_tokens)
    for one, other in zip(as_text, as_tokens):
        assert one["id"] == other["id"] and one["logprob"] == pytest.approx(other["logprob"], abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "architecture"),
    [
        ({"ratio": 0.4, "recovery": "lstsq"}, "deci"),
        ({"ratio": 0.3, "head_unit": "query"}, "deci"),
        ({"ratio": 0.5, "allocation": "uniform"}, "deci"),
        ({"ratio": 0.5, "preset": "slimllm", "allocation": "uniform", "recovery": "none"}, "llama"),
    ],
)
def test_next_tokens(token_ids: torch.Tensor, tmp_path: Path, settings: dict[str, Any], architecture: str) -> None:
    slimllm.prune(STORIES, tmp_path / "out", config(token_ids, **settings))
    assert export(tmp_path / "out", tmp_path / "m.gguf", "gguf") == architecture
    assert_the_same(tmp_path / "out", tmp_path / "m.gguf")


def test_rotary_scaling(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model = random_llama(vocab_size=512, rope_parameters=scaling, attention_bias=False, mlp_bias=False)
    model.save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(tmp_path / "dense")
    ids = torch.randint(3, 512, (8, 64), generator=torch.Generator().manual_seed(0))
    slimllm.prune(tmp_path / "dense", tmp_path / "out", config(ids, ratio=0.3))
    export(tmp_path / "out", tmp_path / "m.gguf", "gguf")
    assert_the_same(tmp_path / "out", tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3", {"use_sliding_window": False, "layer_types": None, "sliding_window": None, "attention_bias": False}),
        ("gemma2", {"query_pre_attn_scalar": 16, "attention_bias": False}),
        ("gemma3_text", {"query_pre_attn_scalar": 16, "final_logit_softcapping": None, "num_hidden_layers": 7}),
    ],
)
@pytest.mark.parametrize("methods", [{"recovery": "lstsq"}, {"preset": "best"}])
def test_other_families(family: str, changes: dict[str, Any], methods: dict[str, str], tmp_path: Path) -> None:
    if family == "gemma3_text":
        changes = changes | {"layer_types": [f"{'full' if i == 5 else 'sliding'}_attention" for i in range(7)]}
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 192}
    saved(tiny(family, vocab_size=512, **sizes, **changes), tmp_path / "dense")
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(tmp_path / "dense")
    ids = torch.randint(3, 512, (8, 64), generator=torch.Generator().manual_seed(0))
    settings = config(ids, ratio=0.3, allocation="uniform", bias="no", **methods)
    slimllm.prune(tmp_path / "dense", tmp_path / "out", settings)
    assert export(tmp_path / "out", tmp_path / "m.gguf", "gguf") == family.removesuffix("_text")
    assert_the_same(tmp_path / "out", tmp_path / "m.gguf")


def test_demo_model(tmp_path: Path) -> None:
    path = find_demo_model()
    if path is None:
        pytest.skip("the demo's model is not installed; make demo does that")
    _, tokenizer = slimllm.load(path)
    ids = draw_windows(tokenize(tokenizer, [bundled_text("calibration")]), samples=8, seq_len=64, seed=0)
    slimllm.prune(path, tmp_path / "out", config(ids, ratio=0.5, dtype="float32"))
    export(tmp_path / "out", tmp_path / "m.gguf", "gguf")
    assert_the_same(tmp_path / "out", tmp_path / "m.gguf")
    said = server(tmp_path / "m.gguf").handle_chat_completions(
        {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8, "temperature": 0.0}
    )
    assert said["choices"][0]["message"]["role"] == "assistant" and said["usage"]["completion_tokens"] > 0
