"""Every family, as a tiny seeded model with all its peculiarities switched on: computed, pruned, written and loaded."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import logits
from safetensors.torch import load_file, save_file
from tiny_models import COMMON, MIXTURES, PECULIAR, of_this_version, saved, tiny
from transformers import AutoConfig, AutoModelForCausalLM

import slimllm
from slimllm import InputError, PruneConfig
from slimllm.experiments.bench.forecast import forecast
from slimllm.export.api import export
from slimllm.models.families import FAMILIES, family_of


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    """More windows than features, longer than a sliding window."""
    return torch.randint(3, 96, (12, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=sorted(PECULIAR))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_family_is_here() -> None:
    assert {spec.name for spec in FAMILIES.values()} == {*PECULIAR, *MIXTURES}


def test_the_engine_computes_what_the_model_does(family: str, ids: torch.Tensor, tmp_path: Path) -> None:
    """From the checkpoint, layer by layer: embeddings, masks, rotary embeddings, norms, soft caps and the head."""
    model = tiny(family)
    report = slimllm.prune(saved(model, tmp_path / "dense"), tmp_path / "out", PruneConfig(0.3, "slimllm", calibration=ids))
    used = ids[: report.calibration["perplexity_tokens"] // ids.shape[1]]
    with torch.no_grad():
        loss = float(model(used, labels=used).loss)
        assert report.calibration["perplexity_dense"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-4)
        pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        loss = float(pruned(used, labels=used).loss)
    assert report.calibration["perplexity_pruned"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-4)
    assert report.achieved_ratio == pytest.approx(0.3, rel=0.02)
    assert report.format == f"slim_{family}"


@pytest.mark.parametrize(
    "settings", [pytest.param({}, marks=pytest.mark.slow), {"preset": "best"}, {"recovery": "lstsq", "head_unit": "query"}]
)
def test_in_memory_and_reloaded(family: str, ids: torch.Tensor, tmp_path: Path, settings: dict[str, Any]) -> None:
    model = tiny(family)
    folder = saved(model, tmp_path / "dense")
    slimllm.prune(
        folder,
        tmp_path / "out",
        PruneConfig(**{"ratio": 0.4, "preset": "slimllm", "calibration": ids, "round_to": 1, **settings}),
    )
    slimllm.prune_model(model, ids, PruneConfig(**{"ratio": 0.4, "preset": "slimllm", "round_to": 1, **settings}))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(loaded, ids), logits(model, ids), atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, ids), logits(model, ids))
    prompt = ids[:2, :12]
    how = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 10, "do_sample": False}
    assert torch.equal(loaded.generate(prompt, **how), loaded.generate(prompt, use_cache=False, **how))


@pytest.mark.parametrize(
    ("recovery", "token_weights"),
    [
        ("affine", "none"),
        ("lstsq", "norm"),
        pytest.param("affine", "norm", marks=pytest.mark.slow),
        pytest.param("lstsq", "none", marks=pytest.mark.slow),
    ],
)
def test_recovery_has_the_error_that_it_reports(family: str, ids: torch.Tensor, recovery: str, token_weights: str) -> None:
    """Against raw activations: the output projections' outputs in the first layer, before and after."""
    model = tiny(family)
    pruned = copy.deepcopy(model)
    settings = PruneConfig(
        0.45, "slimllm", recovery=recovery, allocation="uniform", token_weights=token_weights, round_to=1
    )
    report, spec = slimllm.prune_model(pruned, ids, settings), family_of(family)
    between = copy.deepcopy(pruned)  # the FFN as it was, behind the pruned attention
    projections = {"attention": spec.o_proj, "ffn": spec.down_proj}
    for name in (*spec.into_ffn, spec.down_proj):
        layer_between, layer_before = (one.get_submodule(f"{spec.layers}.0") for one in (between, model))
        layer_between.set_submodule(name, copy.deepcopy(layer_before.get_submodule(name)))
    for part, before in (("attention", model), ("ffn", between)):
        outputs, streams = [], []
        for one in (before, pruned):
            layer = one.get_submodule(f"{spec.layers}.0")
            found: dict[str, torch.Tensor] = {}
            norm = spec.attention_norm if part == "attention" else spec.ffn_norm
            hooks = [
                layer.get_submodule(projections[part]).register_forward_hook(
                    lambda m, a, out, to=found: to.update(out=out.reshape(-1, out.shape[-1]).double())
                ),
                layer.get_submodule(norm).register_forward_pre_hook(
                    lambda m, a, to=found: to.update(stream=a[0].reshape(-1, a[0].shape[-1]).double())
                ),
            ]
            logits(one, ids)
            for hook in hooks:
                hook.remove()
            outputs.append(found["out"])
            streams.append(found["stream"])
        weight = torch.ones(len(outputs[0]), dtype=torch.float64)
        if token_weights == "norm":
            post = spec.attention_post_norm if part == "attention" else spec.ffn_post_norm
            with torch.no_grad():
                added = before.model.layers[0].get_submodule(post)(outputs[0].float()).double() if post else outputs[0]
            factor = getattr(before.model.layers[0], spec.update_factor) if spec.update_factor else 1
            behind = streams[0] + factor * added
            if family in ("opt", "bloom", "nemotron", "starcoder2"):  # LayerNorm
                behind = behind - behind.mean(1, keepdim=True)
            weight = 1 / behind.square().mean(1)
            if post:
                weight /= outputs[0].square().mean(1)
        weight = (weight / weight.sum())[:, None]
        variance = (weight * (outputs[0] - (weight * outputs[0]).sum(0)).square()).sum()
        error = (weight * (outputs[0] - outputs[1]).square()).sum() / variance
        assert report.layers[0][f"{part}_error_after"] == pytest.approx(float(error), rel=2e-3)


def test_a_norm_between_says_which_outputs_count(ids: torch.Tensor) -> None:
    """Gemma multiplies by 1 + w: here all but one output by 0, so that what reaches that one is all that matters."""
    model = tiny("gemma2")
    with torch.no_grad():
        model.model.layers[0].post_feedforward_layernorm.weight.fill_(-1.0)[5] = 1.0
    found: list[torch.Tensor] = []
    project = model.model.layers[0].mlp.down_proj
    hook = project.register_forward_hook(lambda m, a, out: found.append(a[0].flatten(0, 1)))
    logits(model, ids)
    hook.remove()
    wanted = project.weight[5].detach().abs() * found[0].norm(dim=0)
    for criterion in ("wanda-sp", "obs"):
        settings = PruneConfig(0.1, "slimllm", criterion=criterion, recovery="lstsq", allocation="uniform", round_to=1)
        first = slimllm.prune_model(copy.deepcopy(model), ids, settings).layers[0]
        assert first["num_heads"] == 6 and first["intermediate_size"] < 96
        scores = torch.tensor(first["channel_importance"])
        if criterion == "wanda-sp":
            assert torch.allclose(scores / scores.sum(), wanted / wanted.sum(), rtol=1e-4)
        else:  # what goes reaches other outputs more than this one
            gone = torch.ones(96, dtype=torch.bool).index_fill_(0, torch.tensor(first["kept_channels"]), False)
            assert wanted[gone].mean() < 0.5 * wanted.mean()


@pytest.mark.parametrize(
    "family",
    [
        one if one in ("llama", "gemma3_text", "opt", "apertus") else pytest.param(one, marks=pytest.mark.slow)
        for one in sorted(PECULIAR)
    ],
)
def test_lora_trains_is_saved_and_merges(family: str, ids: torch.Tensor, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    settings = PruneConfig(0.4, "slimllm", calibration=ids, round_to=1)
    slimllm.prune(saved(tiny(family), tmp_path / "dense"), tmp_path / "out", settings)
    model, spec = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), family_of(family)
    targets = [name.rpartition(".")[2] for name in (spec.q_proj, spec.v_proj, spec.o_proj, spec.up_proj, spec.down_proj)]
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    optimizer = torch.optim.AdamW((one for one in tuned.parameters() if one.requires_grad), lr=0.01)
    losses = []
    for _ in range(3):
        loss = tuned(ids, labels=ids).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[0]
    tuned.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tmp_path / "adapter").eval()
    assert torch.allclose(logits(again, ids), logits(tuned, ids), atol=1e-5)
    merged = again.merge_and_unload()
    assert torch.allclose(logits(merged, ids), logits(tuned, ids), atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), ids), logits(merged, ids))


STRANGER = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
ids = load_file("ids.safetensors")["ids"]
for family in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(family, trust_remote_code=True)
    with torch.no_grad():
        save_file({"logits": model(ids).logits}, f"{family}.safetensors")
    assert type(AutoModel.from_pretrained(family, trust_remote_code=True)).__module__.startswith("transformers_modules")
assert "slimllm" not in sys.modules
"""


def test_loads_without_slimllm(ids: torch.Tensor, tmp_path: Path) -> None:
    expected = {}
    for family in (*PECULIAR, *MIXTURES):
        settings = PruneConfig(0.3, "best" if family in MIXTURES else "slimllm", calibration=ids)
        slimllm.prune(saved(tiny(family), tmp_path / f"dense-{family}"), tmp_path / family, settings)
        expected[family] = logits(AutoModelForCausalLM.from_pretrained(tmp_path / family), ids)
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", STRANGER, *PECULIAR, *MIXTURES]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for family, wanted in expected.items():
        assert torch.allclose(load_file(tmp_path / f"{family}.safetensors")["logits"], wanted, atol=1e-5), family


NO_WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False, "layer_types": ["full_attention"] * 4},
}


@pytest.mark.parametrize(
    ("family", "recovery", "changes", "wanted"),
    [
        *[(family, "none", {}, family) for family in PECULIAR if family not in ("opt", "bloom")],
        ("opt", "lstsq", {}, "slim_opt"),  # which computes the size of a head from their number
        ("bloom", "lstsq", {}, "slim_bloom"),  # which computes the slopes of its position bias from their number
        ("llama", "affine", {}, "llama"),
        ("llama", "lstsq", {"attention_bias": False}, "seed_oss"),
        ("mistral", "affine", NO_WINDOWS["mistral"], "seed_oss"),
        ("qwen2", "lstsq", NO_WINDOWS["qwen2"], "seed_oss"),
        ("mistral", "affine", {}, "slim_mistral"),  # its own architecture has no place for the recovery's biases
        ("qwen2", "bias", {}, "slim_qwen2"),
        ("qwen3", "lstsq", {}, "slim_qwen3"),
        ("gemma3_text", "affine", {}, "slim_gemma3_text"),
        *[
            pytest.param(family, "affine", NO_WINDOWS.get(family, {}), "", marks=pytest.mark.slow)
            for family in PECULIAR
            if family not in ("llama", "mistral")
        ],
    ],
)
def test_alike_layers_are_written_as_a_stock_model_that_keeps_all(
    ids: torch.Tensor, tmp_path: Path, family: str, recovery: str, changes: dict[str, Any], wanted: str
) -> None:
    model = tiny(family, **changes)
    folder = saved(model, tmp_path / "dense")
    settings: dict[str, Any] = {
        "ratio": 0.45,
        "preset": "slimllm",
        "recovery": recovery,
        "allocation": "uniform",
        "round_to": 1,
    }
    report = slimllm.prune(folder, tmp_path / "out", PruneConfig(calibration=ids, **settings))
    assert len({(one["num_heads"], one["intermediate_size"]) for one in report.layers}) == 1
    assert report.format == wanted or not wanted
    assert any((tmp_path / "out").glob("*.py")) == report.format.startswith("slim_")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    used = ids[: report.calibration["perplexity_tokens"] // ids.shape[1]]
    with torch.no_grad():  # of the engine, which does not know the architecture that was written
        loss = loaded(used, labels=used).loss
    assert report.calibration["perplexity_pruned"] == pytest.approx(loss.exp().item(), rel=1e-4)
    for form in ("stock", "padded"):
        try:
            export(tmp_path / "out", tmp_path / form, form)
        except InputError:
            assert report.format.startswith("slim_")
        else:
            other = AutoModelForCausalLM.from_pretrained(tmp_path / form)
            assert torch.allclose(logits(other, ids), logits(loaded, ids), atol=1e-5)
    slimllm.prune_model(model, ids, PruneConfig(**settings))
    assert torch.allclose(logits(loaded, ids), logits(model, ids), atol=1e-5)
    again = slimllm.prune(tmp_path / "out", tmp_path / "again", PruneConfig(0.2, "slimllm", calibration=ids, round_to=1))
    assert again.achieved_ratio == pytest.approx(0.2, rel=0.03)


@pytest.mark.parametrize("kind", [*PECULIAR, *MIXTURES, "phi3"])
def test_plan_from_the_configuration_alone(kind: str, tmp_path: Path) -> None:
    settings = {name: value for name, value in COMMON.items() if kind != "phi3" or name != "head_dim"}
    AutoConfig.for_model(kind, **of_this_version({**settings, **(PECULIAR | MIXTURES).get(kind, {})})).save_pretrained(
        tmp_path
    )
    found = forecast(str(tmp_path), PruneConfig(0.3), for_gpu=True)  # whose time is not known, nor measured
    assert found.num_layers == 4 and found.plan.peak_host > 0


@pytest.mark.parametrize("wrong", [{"stock_holds": lambda biases: True}, {"takes_heads": lambda config, heads: True}])
def test_a_family_that_promises_too_much_is_refused(
    wrong: dict[str, Any], ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is pruned: its own class would have no place for a tensor that is written."""
    family = "qwen2" if "stock_holds" in wrong else "opt"
    monkeypatch.setitem(FAMILIES, family, dataclasses.replace(FAMILIES[family], **wrong))
    settings = PruneConfig(0.45, "slimllm", allocation="uniform", calibration=ids, round_to=1)
    with pytest.raises(InputError, match=f"description of {family} in slimllm/models/families is wrong"):
        slimllm.prune(saved(tiny(family), tmp_path / "dense"), tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_what_is_not_supported_says_why() -> None:
    for kind, reason in (("deepseek_v3", "see all tokens"), ("gpt_neox", "run in parallel"), ("gpt2", "'gpt2' are not")):
        with pytest.raises(InputError, match=f"{reason}.*supported types are apertus"):
            family_of(kind)
