"""Families whose fused projections are taken apart when they are read: Phi-3 and BLOOM, beside the stock models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import COMMON, IDS, of_this_version, saved
from transformers import AutoConfig, AutoModelForCausalLM

import slimllm
from slimllm import InputError, PruneConfig
from slimllm.export.api import export

PHI3: dict[str, dict[str, Any]] = {
    "windows": {"sliding_window": 7},
    "long": {
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 500.0,
            "long_factor": [2.0] * 4,
            "short_factor": [1.0, 2.0, 3.0, 4.0],
            "original_max_position_embeddings": 16,
        },
    },
}


@pytest.fixture
def ids() -> torch.Tensor:
    return IDS


@pytest.mark.parametrize("kind", PHI3)
@pytest.mark.parametrize("settings", [{}, {"allocation": "uniform", "recovery": "none"}])
def test_phi3_is_read_as_what_it_computes(ids: torch.Tensor, tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    """Its fused projections are taken apart; what is written is Mistral, or of its mathematics."""
    settings_of = {name: value for name, value in COMMON.items() if name != "head_dim"}
    config = AutoConfig.for_model("phi3", **of_this_version({**settings_of, **PHI3[kind]}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    settings = {"ratio": 0.45, "calibration": ids, "round_to": 1, **settings}
    report = slimllm.prune(
        saved(model, tmp_path / "dense"), tmp_path / "out", PruneConfig(**{"preset": "slimllm", **settings})
    )
    wanted = "slim_mistral" if len(settings) == 3 else "mistral"
    used = ids[: report.calibration["perplexity_tokens"] // ids.shape[1]]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        dense, pruned = (float(one(used, labels=used).loss) for one in (model, loaded))
    assert report.calibration["perplexity_dense"] == pytest.approx(torch.tensor(dense).exp().item(), rel=1e-4)
    assert report.calibration["perplexity_pruned"] == pytest.approx(torch.tensor(pruned).exp().item(), rel=1e-4)
    assert report.format == wanted
    with pytest.raises(InputError, match="cannot be pruned in memory; save it"):
        slimllm.prune_model(model, ids, PruneConfig(0.3, "slimllm"))


@pytest.mark.parametrize("heads", [4, 6])  # the slopes of six are not those of a power of two
@pytest.mark.parametrize("bare", [False, True])
def test_bloom_is_read_as_what_it_computes(ids: torch.Tensor, tmp_path: Path, heads: int, bare: bool) -> None:
    """Its q, k and v are taken apart, and every head keeps the slope of its position bias."""
    config = AutoConfig.for_model("bloom", vocab_size=96, hidden_size=48, n_layer=4, n_head=heads, pad_token_id=0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = saved(model.transformer if bare else model, tmp_path / "dense")  # the hub's files lack the prefix
    if bare:
        (folder / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": ["BloomForCausalLM"]}))
    with torch.no_grad():
        used = ids[: 256 // ids.shape[1]]
        dense = float(model(used, labels=used).loss)
    report = slimllm.prune(folder, tmp_path / "out", PruneConfig(0.45, "slimllm", calibration=ids, round_to=1))
    assert report.calibration["perplexity_dense"] == pytest.approx(torch.tensor(dense).exp().item(), rel=1e-4)
    assert report.format == "slim_bloom" and any(0 < one["num_heads"] < heads for one in report.layers)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        pruned = float(loaded(used, labels=used).loss)
    assert report.calibration["perplexity_pruned"] == pytest.approx(torch.tensor(pruned).exp().item(), rel=1e-4)
    padded = torch.nn.functional.pad(used, (3, 0))
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand_as(padded)
    with torch.no_grad():
        assert torch.allclose(loaded(padded, attention_mask=mask).logits[:, 3:], loaded(used).logits, atol=1e-4)
    with pytest.raises(InputError, match="cannot be pruned in memory; save it"):
        slimllm.prune_model(model, ids, PruneConfig(0.3, "slimllm"))
    for form, reason in (("stock", "slopes"), ("padded", "slopes"), ("gguf", "LLaMA")):
        with pytest.raises(InputError, match=reason):
            export(tmp_path / "out", tmp_path / "exported.gguf", form)


def test_bloom_as_the_hub_has_it(ids: torch.Tensor, tmp_path: Path) -> None:
    """Old names in config.json, bfloat16, and a mask and a cache as in generation, beside the stock model."""
    config = AutoConfig.for_model("bloom", vocab_size=96, hidden_size=48, n_layer=3, n_head=4)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = saved(model.transformer, tmp_path / "dense")
    settings = config.to_dict()
    for name in ("hidden_size", "dtype", "torch_dtype"):
        settings.pop(name, None)
    settings |= {
        "architectures": ["BloomForCausalLM"],
        "n_embed": 48,
        "num_attention_heads": 4,
        "n_inner": None,
        "seq_length": 2048,
        "offset_alibi": 100,
        "torch_dtype": "bfloat16",
        "attention_softmax_in_fp32": True,
        "skip_bias_add": True,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    everything = PruneConfig(0.001, "slimllm", calibration=ids, round_to=1, recovery="none", allocation="uniform")
    slimllm.prune(folder, tmp_path / "out", everything)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert all(one["num_heads"] == 4 for one in report["layers"])
    stock, ours = (AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("dense", "out"))
    ours.generation_config.pad_token_id = stock.generation_config.pad_token_id = 0
    prompt = torch.nn.functional.pad(ids[:3, :10], (4, 0))
    mask = (torch.arange(14) >= 4).long().expand_as(prompt)
    for index, one in enumerate(report["layers"]):  # the channel that went, if one did, is put out here
        gone = sorted(set(range(192)) - set(one["kept_channels"] or range(192)))
        stock.transformer.h[index].mlp.dense_4h_to_h.weight.data[:, gone] = 0
    how = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    wanted, found = (one.generate(prompt, **how) for one in (stock, ours))
    assert torch.equal(wanted.sequences, found.sequences)
    for one, other in zip(wanted.scores, found.scores):
        assert torch.allclose(one, other, atol=1e-4)
    static = ours.generate(prompt, cache_implementation="static", **how)
    assert torch.equal(static.sequences, found.sequences)
    settings["apply_residual_connection_post_layernorm"] = True
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="after the norms"):
        slimllm.prune(folder, tmp_path / "no", everything)


def test_fused_tensors_of_other_sizes_are_refused(ids: torch.Tensor, tmp_path: Path) -> None:
    phi3 = {name: value for name, value in COMMON.items() if name != "head_dim"}
    for kind, settings, change in (
        ("phi3", phi3, {"intermediate_size": 64}),
        ("phi3", phi3, {"num_key_value_heads": 2}),
        ("bloom", {"vocab_size": 96, "hidden_size": 48, "n_layer": 2, "n_head": 4}, {"hidden_size": 32}),
    ):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **of_this_version(settings)))
        folder = saved(model, tmp_path / f"{kind}{len(change)}{next(iter(change))}")
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(InputError, match=r"has \d+ rows, but its config.json asks for \d+"):
            slimllm.prune(folder, tmp_path / "out", PruneConfig(0.3, "slimllm", calibration=ids))
