"""What a pruned model is written as: it loads in transformers with and without slimllm, and is the model in memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import config, logits, random_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import slimllm
from slimllm import InputError, PruneConfig
from slimllm.methods.allocation.layer_importance import LayerImportance
from slimllm.runtime.progress import Progress


@pytest.mark.parametrize("head_unit", ["kv-group", "query"])
def test_reload_is_the_model_in_memory(
    stories_path: Path, stories: Any, token_ids: torch.Tensor, tmp_path: Path, head_unit: str
) -> None:
    report = slimllm.prune(stories_path, tmp_path / "out", config(token_ids, head_unit=head_unit))
    assert report.format == "slim_llama"
    slimllm.prune_model(stories, token_ids, PruneConfig(0.3, "slimllm", head_unit=head_unit))
    local, _ = slimllm.load(tmp_path / "out", device="cpu")
    assert torch.equal(logits(local, token_ids[:4]), logits(stories, token_ids[:4]))


# What a user does who has transformers and not slimllm.
STRANGER = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)
ids = load_file("ids.safetensors")["ids"]
with torch.no_grad():
    save_file({"logits": model(ids).logits}, "logits.safetensors")
settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))
words = AutoTokenizer.from_pretrained("out", trust_remote_code=True)("Once upon", return_tensors="pt")
model.generate(**words, max_new_tokens=4, do_sample=False)  # the tokenizer gives what the model takes, and no more
assert type(AutoModel.from_pretrained("out", trust_remote_code=True)).__name__ == "SlimLlamaModel"
model.save_pretrained("again")
again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(again(ids).logits, model(ids).logits)
assert type(again).__module__.startswith("transformers_modules") and "slimllm" not in sys.modules
"""


def test_loads_without_slimllm(stories_path: Path, stories: Any, token_ids: torch.Tensor, tmp_path: Path) -> None:
    slimllm.prune(stories_path, tmp_path / "out", config(token_ids))
    slimllm.prune_model(stories, token_ids, PruneConfig(0.3, "slimllm"))
    save_file({"ids": token_ids[:2]}, tmp_path / "ids.safetensors")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert "per-layer attribute" not in done.stderr  # no warnings about sizes that we know differ
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], logits(stories, token_ids[:2]))


def test_generate_with_and_without_cache(stories_path: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    slimllm.prune(stories_path, tmp_path / "out", config(token_ids))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    prompt = token_ids[:2, :10]
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(prompt, use_cache=True, **settings)
    assert torch.equal(with_cache, model.generate(prompt, use_cache=False, **settings))
    eager = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, attn_implementation="eager")
    assert torch.allclose(logits(eager, prompt), logits(model, prompt), atol=1e-4)


def test_layers_on_the_disk(stories_path: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    """As accelerate spreads a model that fits nowhere whole."""
    slimllm.prune(stories_path, tmp_path / "out", config(token_ids))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    places = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    places |= {f"model.layers.{index}": "disk" if index > 1 else "cpu" for index in range(whole.config.num_hidden_layers)}
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert spread.model.layers[3].mlp.up_proj.weight.device.type == "meta"
    assert torch.equal(logits(spread, token_ids[:2]), logits(whole, token_ids[:2]))


@pytest.mark.parametrize("remote", [True, False])
def test_save_pretrained_round_trip(stories_path: Path, token_ids: torch.Tensor, tmp_path: Path, remote: bool) -> None:
    slimllm.prune(stories_path, tmp_path / "out", config(token_ids))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=remote)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_slim_llama.py").is_file()
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert set(saved["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(logits(again, token_ids[:2]), logits(model, token_ids[:2]))


def test_model_in_memory_saves_and_reloads(stories: Any, token_ids: torch.Tensor, tmp_path: Path) -> None:
    slimllm.prune_model(stories, token_ids, PruneConfig(0.3, "slimllm"))
    stories.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert torch.equal(logits(again, token_ids[:2]), logits(stories, token_ids[:2]))
    stories.train()
    loss = stories(token_ids[:2], labels=token_ids[:2]).loss
    loss.backward()
    assert all(p.grad is not None for p in stories.parameters())


def test_a_pruned_checkpoint_can_be_pruned_again(stories_path: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    first = slimllm.prune(stories_path, tmp_path / "once", config(token_ids, ratio=0.2))
    second = slimllm.prune(tmp_path / "once", tmp_path / "twice", config(token_ids, ratio=0.2))
    assert second.parameters["before"] == first.parameters["after"]
    assert second.achieved_ratio == pytest.approx(0.2, rel=0.01)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "twice", trust_remote_code=True)
    assert sum(p.numel() for p in model.parameters()) == second.parameters["after"]
    in_memory, _ = slimllm.load(tmp_path / "once", device="cpu")
    slimllm.prune_model(in_memory, token_ids, PruneConfig(0.2, "slimllm"))
    assert torch.equal(logits(in_memory, token_ids[:2]), logits(model, token_ids[:2]))


def test_a_head_that_differs_is_not_tied(stories_path: Path, stories: Any, token_ids: torch.Tensor, tmp_path: Path) -> None:
    shutil.copytree(stories_path, tmp_path / "model")
    tensors = load_file(stories_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    slimllm.prune(tmp_path / "model", tmp_path / "out", config(token_ids, ratio=1e-5))
    model, _ = slimllm.load(tmp_path / "out", device="cpu")
    assert torch.allclose(logits(model, token_ids[:1]), 2 * logits(stories, token_ids[:1]), atol=1e-4)


def test_a_folder_that_appears_meanwhile_is_not_replaced(
    stories_path: Path, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    def meddle(event: Progress) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "precious").write_text("mine")

    with pytest.raises(InputError, match=r"not empty.*The complete result is in"):
        slimllm.prune(stories_path, tmp_path / "out", config(token_ids), progress=meddle)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]
    (tmp_path / "out").rename(tmp_path / "saved")
    slimllm.prune(stories_path, tmp_path / "out", config(token_ids), resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "saved"]
    slimllm.load(tmp_path / "out")


# Ratios that come out without a remainder, so that all layers end with the same sizes.
@pytest.mark.parametrize(
    ("recovery", "ratio", "wanted"),
    [
        ("affine", 11200 / 45440, "seed_oss"),
        ("lstsq", 11200 / 45440, "seed_oss"),
        ("none", 11328 / 45440, "seed_oss"),
        ("none", 22656 / 45440, "llama"),
    ],
)
def test_uniform_sizes_are_written_as_stock_models(
    stories_path: Path, token_ids: torch.Tensor, tmp_path: Path, recovery: str, ratio: float, wanted: str
) -> None:
    """seed_oss has a home for every bias and any number of heads; llama only where the heads divide the width."""
    settings = {
        "preset": "slimllm",
        "recovery": recovery,
        "ratio": ratio,
        "round_to": 43,
        "allocation": LayerImportance(pruned_layers=5, alpha=0.0),
    }
    out = tmp_path / "out"
    report = slimllm.prune(stories_path, out, config(token_ids, **settings))
    assert len({(r["num_heads"], r["intermediate_size"]) for r in report.layers}) == 1
    # What the stock format fills with zeros is counted, too.
    written, _ = slimllm.load(out, device="cpu")
    assert report.parameters["layers_after"] == sum(p.numel() for p in written.model.layers.parameters())
    assert report.format == wanted
    assert not list(out.glob("*.py"))
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert model.config.model_type == wanted and type(model).__module__.startswith("transformers.models")
    in_memory = AutoModelForCausalLM.from_pretrained(stories_path).eval()
    slimllm.prune_model(in_memory, token_ids, PruneConfig(**settings))
    assert torch.equal(logits(model, token_ids[:2]), logits(in_memory, token_ids[:2]))
    again = slimllm.prune(out, tmp_path / "again", config(token_ids, ratio=0.2))
    assert again.achieved_ratio == pytest.approx(0.2, rel=0.01)


# Peculiarities of LLaMA-type models; biases everywhere and an output head of its own are random_llama's defaults.
PECULIAR: dict[str, dict[str, Any]] = {
    "biases": {},
    "rope scaling": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "heads wider than the model": {"head_dim": 16, "attention_bias": False, "mlp_bias": False},
    "one KV head": {"num_key_value_heads": 1},
    "odd width": {"intermediate_size": 101},
    "tied": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("peculiarity", PECULIAR)
@pytest.mark.parametrize("head_unit", ["kv-group", "query"])
def test_peculiar_models_round_trip(tmp_path: Path, peculiarity: str, head_unit: str) -> None:
    model = random_llama(3, **{"num_key_value_heads": 2, **PECULIAR[peculiarity]})
    model.save_pretrained(tmp_path / "dense")
    token_ids = torch.randint(0, 128, (6, 40), generator=torch.Generator().manual_seed(0))
    settings = {"ratio": 0.3, "preset": "slimllm", "head_unit": head_unit}
    report = slimllm.prune(tmp_path / "dense", tmp_path / "out", PruneConfig(calibration=token_ids, **settings))
    assert report.achieved_ratio == pytest.approx(0.3, rel=0.02)
    slimllm.prune_model(model, token_ids, PruneConfig(**settings))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(logits(loaded, token_ids), logits(model, token_ids))
    assert report.parameters["after"] == sum(p.numel() for p in model.parameters())
    if not model.config.attention_bias:
        assert model.model.layers[0].self_attn.q_proj.bias is None


def test_what_comes_along(stories_path: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    slimllm.prune(stories_path, tmp_path / "out", config(token_ids), command="slimllm prune X")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md", "report.json"} <= names
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Once upon")["input_ids"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "slimllm prune X" in card and "perplexity" in card and "trust_remote_code=True" in card
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["tie_word_embeddings"] is True
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"]
    assert len(set(index["weight_map"].values())) == 6


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_dtype_is_kept_or_changed(stories: Any, token_ids: torch.Tensor, tmp_path: Path, stored: torch.dtype) -> None:
    stories.to(stored).save_pretrained(tmp_path / "dense")
    for asked, wanted in ((None, stored), ("float32", torch.float32)):
        out = tmp_path / f"out-{asked}"
        slimllm.prune(tmp_path / "dense", out, config(token_ids, dtype=asked))
        for shard in out.glob("*.safetensors"):
            with safe_open(shard, framework="pt") as file:
                assert {file.get_tensor(name).dtype for name in file.keys()} == {wanted}
        assert AutoConfig.from_pretrained(out).dtype == wanted
        model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype="auto")
        assert model.dtype == wanted and torch.isfinite(logits(model, token_ids[:1])).all()
