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
from slimllm.methods.recovery.lstsq import RIDGE, RIDGE_OF_FEW
from slimllm.methods.statistics import SublayerStatistics
from slimllm.models.sublayer import Sublayer


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "gemma3_text", "mistral"])
@pytest.mark.parametrize("settings", [{"recovery": "lstsq"}, {"preset": "best"}])
def test_stock_architectures(family: str, settings: dict[str, str], tmp_path: Path) -> None:
    source = saved(tiny(family), tmp_path / "dense")
    common: dict[str, Any] = {"ratio": 0.3, "preset": "slimllm", "allocation": "uniform", "bias": "no", **settings}
    slimllm.prune(source, tmp_path / "out", PruneConfig(**common, calibration=IDS))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == family
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    in_memory = tiny(family)
    slimllm.prune_model(in_memory, IDS, PruneConfig(**common))
    assert torch.allclose(logits(model), logits(in_memory), atol=1e-4)
    of_biases = {
        name
        for folder in (source, tmp_path / "out")
        for file in folder.glob("*.safetensors")
        for name in safe_open(file, "pt").keys()
        if name.endswith(("o_proj.bias", "down_proj.bias"))
    }
    dense_has = {name for file in source.glob("*.safetensors") for name in safe_open(file, "pt").keys()}
    assert of_biases <= dense_has  # none is new


@pytest.mark.parametrize(
    ("changes", "bias", "sentence"),
    [
        ({"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}, "no", "not take 6 heads with a hidden"),
        ({}, "yes", "transformers' gemma3_text has no place for the recovery's biases; give --for"),
        ({}, "no", None),
    ],
)
def test_a_run_says_why_equal_sizes_are_not_stock(
    changes: dict[str, int], bias: str, sentence: str | None, tmp_path: Path, told: list[str]
) -> None:
    source = saved(tiny("gemma3_text", **changes), tmp_path / "dense")
    settings = PruneConfig(0.2, "slimllm", allocation="uniform", recovery="lstsq", bias=bias, calibration=IDS)
    report = slimllm.prune(source, tmp_path / "out", settings)
    assert report.format == ("slim_gemma3_text" if sentence else "gemma3_text")
    why = [one for one in told if one.startswith("The result has the native format, because")]
    assert sentence in why[0] if sentence else not why


def test_layers_of_different_sizes_can_be_padded(tmp_path: Path) -> None:
    source = saved(tiny("qwen3", attention_bias=False), tmp_path / "dense")
    slimllm.prune(source, tmp_path / "out", PruneConfig(0.3, "slimllm", recovery="lstsq", bias="no", calibration=IDS))
    assert export(tmp_path / "out", tmp_path / "padded", "padded") == "qwen3"
    padded = AutoModelForCausalLM.from_pretrained(tmp_path / "padded")
    slim = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.allclose(logits(padded), logits(slim), atol=1e-5)


def test_existing_biases_are_used(tmp_path: Path) -> None:
    """OPT has all biases, so that nothing changes for it."""
    source = saved(tiny("opt"), tmp_path / "dense")
    for bias in ("yes", "no"):
        settings = PruneConfig(0.3, "slimllm", recovery="lstsq", bias=bias, calibration=IDS)
        slimllm.prune(source, tmp_path / bias, settings)
    one, two = (
        {file.name: file.read_bytes() for file in (tmp_path / bias).glob("*.safetensors")} for bias in ("yes", "no")
    )
    assert one == two


def test_what_a_bias_is_worth(token_ids: torch.Tensor) -> None:
    """A trained model loses less with the refit through the origin than without any, and least with a bias."""
    from slimllm.calibration import bundled_text, tokenize

    found, biases = {}, {}
    for name, recovery, bias in (("none", "none", "yes"), ("no", "lstsq", "no"), ("yes", "lstsq", "yes")):
        model, tokenizer = slimllm.load(STORIES)
        tokens = tokenize(tokenizer, [bundled_text("evaluation")[:30_000]])
        slimllm.prune_model(model, token_ids, config(token_ids, ratio=0.3, recovery=recovery, bias=bias))
        found[name] = slimllm.perplexity(model, tokens, seq_len=64)
        biases[name] = sum(parameter.endswith("bias") for parameter, _ in model.named_parameters())
    assert (biases["none"], biases["no"]) == (0, 0) and biases["yes"] > 0
    assert found["yes"] < found["no"] < 0.9 * found["none"]


def test_settings(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="recovery bias works by its bias; with bias no give recovery lstsq"):
        PruneConfig(ratio=0.3, criterion="flap", recovery="bias", bias="no")
    with pytest.raises(InputError, match=r"recovery affine works by its bias; with bias no give recovery lstsq or none"):
        PruneConfig(ratio=0.3, preset="slimllm", bias="no")
    with pytest.raises(InputError, match="bias must be one of auto, yes, no"):
        PruneConfig(ratio=0.3, bias="maybe")
    assert "bias='no'" in repr(PruneConfig(ratio=0.3, recovery="lstsq", bias="no")) and "bias" not in repr(
        PruneConfig(ratio=0.3)
    )


def test_a_recovery_that_does_not_say_that_it_goes_without(forgotten: None) -> None:
    @register_recovery("usual")
    class Usual(Recovery):
        """Of another package, which knows nothing of the setting."""

        def fit(self, sublayer: Sublayer, statistics: SublayerStatistics, kept: torch.Tensor) -> Fit:
            raise AssertionError

    with pytest.raises(InputError, match="recovery usual works by its bias"):
        PruneConfig(ratio=0.3, recovery=Usual(), bias="no")


@pytest.mark.parametrize("samples", [2, 16])
def test_fits_by_hand(samples: int, stories: Any, token_ids: torch.Tensor) -> None:
    """The first attention's output projection against a plain regression on its dense inputs, with few tokens and many."""
    ids = token_ids[:samples]
    projection, taken = stories.model.layers[0].self_attn.o_proj, []
    handle = projection.register_forward_pre_hook(lambda module, args: taken.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        stories(ids)
    handle.remove()
    z, weight = torch.cat(taken).double(), projection.weight.detach().double().clone()
    report = slimllm.prune_model(stories, ids, config(ids, ratio=0.3, recovery="lstsq", bias="no", allocation="uniform"))
    heads = report.layers[0]["kept_heads"]
    kept = torch.cat([torch.arange(8 * head, 8 * head + 8) for head in heads])
    removed = torch.tensor([column for column in range(64) if column not in kept.tolist()])
    new = stories.model.layers[0].self_attn.o_proj
    size, ridge = z[:, kept].square().mean(0).sqrt(), RIDGE if len(z) >= 2 * 64 else RIDGE_OF_FEW
    scaled, lost = z[:, kept] / size, z[:, removed] @ weight[:, removed].T
    system = scaled.T @ scaled / len(z) + ridge * torch.eye(len(kept), dtype=torch.float64)
    wanted = weight[:, kept] + (torch.linalg.solve(system, scaled.T @ lost / len(z)) / size[:, None]).T
    assert 0 < len(removed) < 64 and new.bias is None
    assert torch.allclose(new.weight.detach().double(), wanted, rtol=1e-3, atol=1e-4)


def test_a_shared_dense_pass_is_of_the_same_setting(stories_path: Path, token_ids: torch.Tensor) -> None:
    """What `auto` measures depends on it, so that a comparison must not use one for the other."""
    from slimllm.pruning.dense_pass import _measured
    from slimllm.runtime.hidden_states import Placement

    yes, no = (config(token_ids, preset="best", bias=bias) for bias in ("yes", "no"))
    assert _measured(yes, Placement()) != _measured(no, Placement())


def test_a_recovery_that_gives_a_bias_all_the_same(forgotten: None, token_ids: torch.Tensor, tmp_path: Path) -> None:
    @register_recovery("stubborn")
    class Stubborn(Recovery):
        """A bias of 0 everywhere."""

        goes_without_bias = True

        def fit(self, sublayer: Sublayer, statistics: SublayerStatistics, kept: torch.Tensor) -> Fit:
            moments = statistics.moments(kept)
            return Fit.of_moments(moments, torch.ones_like(moments.mean_y), torch.zeros_like(moments.mean_y))

    with pytest.raises(InputError, match="takes no bias, but has goes_without_bias = True"):
        slimllm.prune(STORIES, tmp_path / "out", config(token_ids, recovery=Stubborn(), bias="no"))
