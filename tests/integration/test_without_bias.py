"""Pruning without new biases: results in the family's own architecture where there is no place for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORIES, config
from safetensors import safe_open
from tiny_models import IDS, saved, tiny
from transformers import AutoModelForCausalLM

import slimllm
from slimllm import InputError, PruneConfig
from slimllm.export import export
from slimllm.methods.recovery.base import Fit, Recovery, register_recovery
from slimllm.methods.statistics import SublayerStatistics
from slimllm.models.sublayer import Sublayer


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3"])
@pytest.mark.parametrize("preset", ["default", "best"])
def test_stock_architectures(family: str, preset: str, tmp_path: Path) -> None:
    source = saved(tiny(family), tmp_path / "dense")
    stock = "mistral" if family == "phi3" else family
    settings = PruneConfig(ratio=0.3, preset=preset, allocation="uniform", bias="no", calibration=IDS)
    report = slimllm.prune(source, tmp_path / "out", settings)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == stock
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    again, _ = slimllm.load(tmp_path / "out")
    assert torch.equal(logits(model), logits(again))
    of_biases = {
        name
        for folder in (source, tmp_path / "out")
        for file in folder.glob("*.safetensors")
        for name in safe_open(file, "pt").keys()
        if name.endswith(("o_proj.bias", "down_proj.bias"))
    }
    dense_has = {name for file in source.glob("*.safetensors") for name in safe_open(file, "pt").keys()}
    assert of_biases <= dense_has  # none is new
    assert report.parameters_after < report.parameters_before


def test_layers_of_different_sizes_can_be_padded(tmp_path: Path) -> None:
    source = saved(tiny("qwen3", attention_bias=False), tmp_path / "dense")
    slimllm.prune(source, tmp_path / "out", PruneConfig(ratio=0.3, recovery="lstsq", bias="no", calibration=IDS))
    assert export(tmp_path / "out", tmp_path / "padded", "padded") == "qwen3"
    padded = AutoModelForCausalLM.from_pretrained(tmp_path / "padded")
    assert torch.allclose(logits(padded), logits(slimllm.load(tmp_path / "out")[0]), atol=1e-5)


@pytest.mark.parametrize("recovery", ["affine", "lstsq"])
def test_existing_biases_are_used(recovery: str, tmp_path: Path) -> None:
    """OPT has all biases, so that nothing changes for it."""
    source = saved(tiny("opt"), tmp_path / "dense")
    for bias in ("yes", "no"):
        settings = PruneConfig(ratio=0.3, recovery=recovery, bias=bias, calibration=IDS)
        slimllm.prune(source, tmp_path / bias, settings)
    one, two = (
        {file.name: file.read_bytes() for file in (tmp_path / bias).glob("*.safetensors")} for bias in ("yes", "no")
    )
    assert one == two


def test_what_a_bias_is_worth(token_ids: torch.Tensor) -> None:
    """A trained model loses less with the refit through the origin than without any, and least with a bias."""
    from slimllm.calibration import bundled_text, tokenize

    found = {}
    for name, recovery, bias in (("none", "none", "yes"), ("no", "lstsq", "no"), ("yes", "lstsq", "yes")):
        model, tokenizer = slimllm.load(STORIES)
        tokens = tokenize(tokenizer, [bundled_text("evaluation")[:30_000]])
        slimllm.prune_model(model, token_ids, config(token_ids, ratio=0.3, recovery=recovery, bias=bias))
        found[name] = slimllm.perplexity(model, tokens, seq_len=64)
    assert found["no"] < 0.9 * found["none"] and found["no"] < 1.1 * found["yes"]


def test_settings(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="recovery bias is a bias; give bias yes, or another recovery"):
        PruneConfig(ratio=0.3, criterion="flap", recovery="bias", bias="no")
    with pytest.raises(InputError, match="bias must be one of yes, no"):
        PruneConfig(ratio=0.3, bias="maybe")
    assert "bias='no'" in repr(PruneConfig(ratio=0.3, bias="no")) and "bias" not in repr(PruneConfig(ratio=0.3))


def test_a_recovery_that_gives_a_bias_all_the_same(forgotten: None, token_ids: torch.Tensor, tmp_path: Path) -> None:
    @register_recovery("stubborn")
    class Stubborn(Recovery):
        """A bias of 0 everywhere."""

        def fit(self, sublayer: Sublayer, statistics: SublayerStatistics, kept: torch.Tensor) -> Fit:
            moments = statistics.moments(kept)
            return Fit.of_moments(moments, torch.ones_like(moments.mean_y), torch.zeros_like(moments.mean_y))

    with pytest.raises(InputError, match="takes no bias; declare needs_bias = True"):
        slimllm.prune(STORIES, tmp_path / "out", config(token_ids, recovery=Stubborn(), bias="no"))
