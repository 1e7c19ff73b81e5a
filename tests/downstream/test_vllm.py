"""Pruned models in vLLM, in an environment of its own (`make test-vllm` makes it)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORIES, config, logits
from tiny_models import MIXTURES, saved, tiny
from transformers import AutoTokenizer

import slimllm
from slimllm import PruneConfig
from slimllm.calibration import bundled_text, draw_windows, tokenize
from slimllm.cli.demo_display import find_demo_model
from slimllm.export.api import export

PYTHON = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="vLLM has no environment here; make test-vllm makes it"),
]

# Prompts in, log-probabilities of their tokens and the most likely next ones out.
SCRIPT = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    prompts = json.load(open("prompts.json"))
    model = LLM(sys.argv[1], trust_remote_code=True, dtype="float32", max_model_len=128, enforce_eager=True, max_num_seqs=4)
    wanted = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, prompt_logprobs=0)
    answers = model.generate([{"prompt_token_ids": ids} for ids in prompts], wanted)
    found = [
        {"logprobs": [next(iter(one.values())).logprob for one in answer.prompt_logprobs[1:]],
         "next": list(answer.outputs[0].token_ids)}
        for answer in answers
    ]
    json.dump(found, open("found.json", "w"))
"""


@pytest.mark.parametrize(
    ("settings", "form", "architecture"),
    [
        ({"ratio": 0.2, "preset": "best"}, None, "slim_llama"),
        ({"ratio": 0.3, "program": "vllm"}, None, "llama"),
        ({"ratio": 0.5, "recovery": "lstsq", "head_unit": "query"}, None, "slim_llama"),
        ({"ratio": 0.3}, "padded", "seed_oss"),
        ({"ratio": 0.5, "recovery": "lstsq", "allocation": "uniform"}, "stock", "seed_oss"),
        ({"ratio": 0.2, "preset": "slimllm", "recovery": "none", "allocation": "uniform"}, "stock", "llama"),
    ],
)
def test_demo_model(tmp_path: Path, settings: dict[str, Any], form: str | None, architecture: str) -> None:
    path = find_demo_model()
    if path is None:
        pytest.skip("the demo's model is not installed; make demo does that")
    _, tokenizer = slimllm.load(path)
    ids = draw_windows(tokenize(tokenizer, [bundled_text("calibration")]), samples=8, seq_len=64, seed=0)
    slimllm.prune(path, tmp_path / "out", config(ids, dtype="float32", **settings))
    folder = tmp_path / (form or "out")
    if form:
        export(tmp_path / "out", folder, form)
    model, _ = slimllm.load(folder)
    assert model.config.model_type == architecture
    prompts = ids[:3, :40]
    compare(model, folder, prompts, tmp_path)


@pytest.mark.parametrize("family", sorted(MIXTURES))
def test_a_mixture_of_experts(family: str, tmp_path: Path) -> None:
    """With random weights, and heads as wide as vLLM has them on a CPU."""
    widths = {"moe_intermediate_size": 128} if family == "qwen3_moe" else {"intermediate_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "attention_bias": False}
    dense = saved(tiny(family, vocab_size=512, hidden_size=128, **heads, **widths), tmp_path / "dense")
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(dense)
    ids = torch.randint(3, 400, (32, 40), generator=torch.Generator().manual_seed(1))
    slimllm.prune(dense, tmp_path / "out", PruneConfig(0.3, program="vllm", dtype="float32", calibration=ids))
    model, _ = slimllm.load(tmp_path / "out")
    assert model.config.model_type == family
    compare(model, tmp_path / "out", ids[:3], tmp_path)


def compare(model: Any, folder: Path, prompts: torch.Tensor, tmp_path: Path) -> None:
    """vLLM's log-probabilities and greedy continuations with torch's."""
    (tmp_path / "prompts.json").write_text(json.dumps(prompts.tolist()))
    (tmp_path / "ask.py").write_text(SCRIPT)
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [str(PYTHON), "ask.py", str(folder)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = logits(model, prompts).log_softmax(-1)[:, :-1].gather(2, prompts[:, 1:, None])[..., 0]
    for number, found in enumerate(json.loads((tmp_path / "found.json").read_text())):
        assert torch.allclose(torch.tensor(found["logprobs"]), wanted[number], rtol=0, atol=5e-3)
        settings_of_generation = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "repetition_penalty": 1.0}
        said = model.generate(prompts[number : number + 1], **settings_of_generation)[0, prompts.shape[1] :]
        assert said.tolist() == found["next"]
