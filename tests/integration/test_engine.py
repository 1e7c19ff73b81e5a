"""Runs of the whole engine on a real model: ratios, choices, recovery, the report, and what is refused."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import config, logits, random_llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import slimllm
from slimllm import InputError, PruneConfig, PruneReport
from slimllm.experiments.bench.synthetic import as_mha
from slimllm.methods.allocation.layer_importance import LayerImportance
from slimllm.runtime.hidden_states import Placement


def digests(folder: Path) -> dict[str, str]:
    """Of every file but the report, which holds times."""
    files = sorted(file for file in folder.iterdir() if file.name != "report.json")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.real_device  # tied weights part on the simulated one
@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.35, 0.5, 0.7])
def test_the_ratio_is_met(stories_path: Path, token_ids: torch.Tensor, tmp_path: Path, ratio: float) -> None:
    report = slimllm.prune(stories_path, tmp_path / "out", config(token_ids, ratio=ratio))
    assert report.achieved_ratio == pytest.approx(ratio, rel=0.005)
    model, _ = slimllm.load(tmp_path / "out", device="cpu")
    assert sum(p.numel() for p in model.parameters()) == report.parameters["after"]
    assert sum(p.numel() for p in model.model.layers.parameters()) == report.parameters["layers_after"]


@pytest.mark.parametrize(("preset", "windows"), [("paper", 16), ("slimllm", 12), ("best", 16)])
def test_layer_similarity_is_that_of_the_dense_model(
    stories: Any, token_ids: torch.Tensor, preset: str, windows: int
) -> None:
    """On all windows, or on the first ones, which are enough for the allocation by importance."""
    with torch.no_grad():
        hidden = stories(token_ids[:windows], output_hidden_states=True).hidden_states[
            :-1
        ]  # the last one is behind the final norm
    wanted = [torch.cosine_similarity(a.double(), b.double(), dim=-1).mean() for a, b in pairwise(hidden)]
    report = slimllm.prune_model(stories, token_ids, PruneConfig(ratio=0.3, preset=preset))
    assert report.calibration["dense_windows"] == windows
    got = [layer["similarity"] for layer in report.layers]
    assert got[:-1] == pytest.approx([float(value) for value in wanted], abs=1e-6)
    chosen = [layer["index"] for layer in report.layers if layer["ratio"]]
    assert chosen == sorted(sorted(range(5), key=lambda i: -got[i])[: len(chosen)])


def test_recovery_is_rounded_once(stories: Any, token_ids: torch.Tensor, tmp_path: Path) -> None:
    """From bfloat16 weights to float32 ones: the slopes are not rounded to bfloat16 in between."""
    stories.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    slimllm.prune(tmp_path / "dense", tmp_path / "out", config(token_ids, dtype="float32"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    weight = model.model.layers[-1].mlp.down_proj.weight
    assert not torch.equal(weight, weight.to(torch.bfloat16).float())


def test_a_tensor_without_a_home_is_refused(stories_path: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    shutil.copytree(stories_path, tmp_path / "model")
    tensors = load_file(stories_path / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"q_proj\.bias .*has no place"):
        slimllm.prune(tmp_path / "model", tmp_path / "out", config(token_ids))


def test_weights_without_a_tokenizer(stories_path: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(stories_path / name, tmp_path / "model" / name)
    slimllm.prune(tmp_path / "model", tmp_path / "out", config(token_ids))
    assert (tmp_path / "out" / "report.json").is_file()


def test_overflow_in_half_precision_is_a_sentence(stories: Any, token_ids: torch.Tensor, tmp_path: Path) -> None:
    with torch.no_grad():
        stories.model.layers[1].mlp.down_proj.weight.mul_(1e5)
    stories.save_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match=r"after layer 1 .* not finite when computed in float16"):
        slimllm.prune(tmp_path / "dense", tmp_path / "out", config(token_ids, compute_dtype="float16"))


def test_a_model_in_double_precision(stories: Any, token_ids: torch.Tensor) -> None:
    reports = [
        slimllm.prune_model(model, token_ids, PruneConfig(0.3, "slimllm"))
        for model in (copy.deepcopy(stories).double(), stories)
    ]
    for double, single in zip(reports[0].layers, reports[1].layers):
        assert double["kept_heads"] == single["kept_heads"] and double["kept_channels"] == single["kept_channels"]


def test_almost_no_ratio_is_the_identity(stories_path: Path, stories: Any, token_ids: torch.Tensor, tmp_path: Path) -> None:
    report = slimllm.prune(stories_path, tmp_path / "out", config(token_ids, ratio=1e-5))
    assert report.format == "llama" and report.achieved_ratio == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model) is LlamaForCausalLM
    state = stories.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_same_seed_same_files(stories_path: Path, tmp_path: Path) -> None:
    settings = PruneConfig(0.3, "slimllm", samples=8, seq_len=64, seed=5)
    runs = []
    for name in ("a", "b"):
        folder = tmp_path / name / "model"
        slimllm.prune(stories_path, folder, settings, command="the same")
        runs.append(digests(folder))
    assert runs[0] == runs[1]
    slimllm.prune(
        stories_path, tmp_path / "c", PruneConfig(0.3, "slimllm", samples=8, seq_len=64, seed=6), command="the same"
    )
    assert digests(tmp_path / "c") != runs[0]


def test_batch_size_changes_rounding_only(stories: Any, token_ids: torch.Tensor) -> None:
    import copy

    reports, outputs = [], []
    for batch_size in (1, 3, 16):
        model = copy.deepcopy(stories)
        reports.append(slimllm.prune_model(model, token_ids, PruneConfig(0.3, "slimllm", batch_size=batch_size)))
        outputs.append(logits(model, token_ids[:2]))
    for report, output in zip(reports[1:], outputs[1:]):
        for one, other in zip(report.layers, reports[0].layers):
            assert one["kept_heads"] == other["kept_heads"] and one["kept_channels"] == other["kept_channels"]
        assert torch.allclose(output, outputs[0], atol=1e-3)


@pytest.mark.parametrize("recovery", ["affine", "lstsq", "none"])
def test_inner_activations_kept_or_made_again(
    stories: Any, token_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch, recovery: str
) -> None:
    assert token_ids.numel() * 172 * 4 < Placement().keep_inner_bytes
    kept, again = copy.deepcopy(stories), copy.deepcopy(stories)
    first = slimllm.prune_model(kept, token_ids, PruneConfig(0.3, "slimllm", recovery=recovery))
    monkeypatch.setattr("slimllm.pruning.plan.Placement", lambda **rest: Placement(**{**rest, "keep_inner_bytes": 0}))
    second = slimllm.prune_model(again, token_ids, PruneConfig(0.3, "slimllm", recovery=recovery))
    assert [r["kept_channels"] for r in first.layers] == [r["kept_channels"] for r in second.layers]
    assert torch.allclose(logits(kept, token_ids[:2]), logits(again, token_ids[:2]), atol=1e-3)


def test_no_eigenvectors_and_the_same_choices(
    stories_path: Path, token_ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = []
    for name in ("eigh", "function"):
        monkeypatch.setattr("slimllm.ops.channels.computes_vectors", lambda *sizes, name=name: name == "eigh")
        reports.append(slimllm.prune(stories_path, tmp_path / name, config(token_ids)))
    for one, other in zip(reports[0].layers, reports[1].layers):
        assert one["kept_channels"] == other["kept_channels"] and one["kept_heads"] == other["kept_heads"]


def test_recovery_helps(stories: Any, token_ids: torch.Tensor) -> None:
    """On the text of the calibration, and on other text of the same kind."""
    held_out = torch.arange(len(token_ids)) % 2 == 1
    losses, errors = {}, {}
    for recovery in ("none", "affine", "lstsq"):
        model = copy.deepcopy(stories)
        report = slimllm.prune_model(model, token_ids[~held_out], PruneConfig(0.3, "slimllm", recovery=recovery))
        with torch.no_grad():
            losses[recovery] = float(model(token_ids[held_out], labels=token_ids[held_out]).loss)
        layers = [layer for layer in report.layers if "ffn_error_before" in layer]
        for part in ("ffn", "attention"):
            for layer in layers:
                assert layer.get(f"{part}_error_after", 0) <= layer.get(f"{part}_error_before", 0) + 1e-12
        errors[recovery] = layers[0]["ffn_error_after"]  # before which all three have done the same
    assert errors["lstsq"] < errors["affine"] < errors["none"]
    assert losses["lstsq"] < losses["affine"] < losses["none"]


@pytest.mark.parametrize("recovery", ["lstsq", "affine"])
@pytest.mark.parametrize("token_weights", ["none", "norm"])
def test_recovery_has_the_error_that_it_reports(
    stories: Any, token_ids: torch.Tensor, recovery: str, token_weights: str
) -> None:
    """The first pruned layer's outputs, dense and pruned, measured on the model itself."""
    pruned = copy.deepcopy(stories)
    settings = PruneConfig(
        0.3, "slimllm", recovery=recovery, allocation=LayerImportance(pruned_layers=5), token_weights=token_weights
    )
    report = slimllm.prune_model(pruned, token_ids, settings)
    hidden = stories.model.embed_tokens(token_ids).detach()
    for name, part in (("self_attn", "attention"), ("mlp", "ffn")):
        outputs: dict[str, torch.Tensor] = {}
        for key, model in (("dense", stories), ("pruned", pruned)):
            module = model.model.layers[0].get_submodule(name)
            module.register_forward_hook(
                lambda m, a, out, key=key, to=outputs: to.update({key: out[0] if isinstance(out, tuple) else out})
            )
        if part == "ffn":  # its input is that of the pruned attention
            inputs: list[torch.Tensor] = []
            pruned.model.layers[0].mlp.register_forward_pre_hook(lambda m, a, inputs=inputs: inputs.append(a[0]))
        with torch.no_grad():
            pruned(token_ids)
            stories(token_ids) if part == "attention" else stories.model.layers[0].mlp(inputs[0])
        dense, left = (outputs[key].flatten(0, 1).double() for key in ("dense", "pruned"))
        weight = torch.ones(len(dense), dtype=torch.float64)
        if token_weights == "norm":
            weight = 1 / (hidden.flatten(0, 1).double() + dense).square().mean(1)
        weight = (weight / weight.sum())[:, None]
        variance = (weight * (dense - (weight * dense).sum(0)).square()).sum()
        error = (weight * (dense - left).square()).sum() / variance
        assert report.layers[0][f"{part}_error_after"] == pytest.approx(float(error), rel=1e-3)
        hidden = hidden + outputs["pruned"]


def test_report_says_what_happened(stories_path: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    returned = slimllm.prune(stories_path, tmp_path / "out", config(token_ids))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["parameters"]) == {"before", "after", "layers_before", "layers_after"}
    for name in ("elapsed_s", "dense_pass_s", "peak_host_gib", "peak_gpu_gib", "config", "versions", "backend"):
        assert name in report
    assert report["elapsed_s"] > report["dense_pass_s"] > 0
    assert len(report["layers"]) == 5
    for index, layer in enumerate(report["layers"]):
        assert layer["index"] == index
        assert len(layer["kept_heads"]) == layer["num_heads"]
        assert len(layer["kept_kv_heads"]) == layer["num_kv_heads"]
        assert len(layer["kept_channels"]) == layer["intermediate_size"]
        assert {"similarity", "ratio", "elapsed_s", "peak_host_gib", "parameters_after"} <= set(layer)
    pruned = [layer for layer in report["layers"] if layer["ratio"]]
    assert pruned and all(len(layer["channel_importance"]) == 172 for layer in pruned)
    assert PruneReport.read(tmp_path / "out").parameters == returned.parameters
    with pytest.raises(ValueError, match=r"There is no .*report\.json"):
        PruneReport.read(tmp_path)


def test_compute_dtype(stories_path: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    report = slimllm.prune(stories_path, tmp_path / "out", config(token_ids, compute_dtype="bfloat16"))
    exact = slimllm.prune(stories_path, tmp_path / "exact", config(token_ids))
    assert report.compute_dtype == "bfloat16"
    assert report.calibration["perplexity_pruned"] == pytest.approx(exact.calibration["perplexity_pruned"], rel=0.1)


def test_mha_copy_of_a_gqa_model_prunes_to_the_ratio(stories: Any, token_ids: torch.Tensor) -> None:
    reports = []
    for head_unit in ("kv-group", "query"):
        model = as_mha(stories)
        reports.append(slimllm.prune_model(model, token_ids, PruneConfig(0.4, "slimllm", head_unit=head_unit)))
        assert reports[-1].achieved_ratio == pytest.approx(0.4, rel=0.005)
    # A group of one query head is that head.
    assert [layer["kept_heads"] for layer in reports[0].layers] == [layer["kept_heads"] for layer in reports[1].layers]
    assert any(layer["num_heads"] < 8 for layer in reports[0].layers)


def test_a_missed_ratio_is_said(stories_path: Path, token_ids: torch.Tensor, tmp_path: Path, told: list[str]) -> None:
    for name, settings in (("coarse", {"ratio": 0.2, "round_to": 172}), ("tiny", {"ratio": 1e-4})):
        report = slimllm.prune(stories_path, tmp_path / name, config(token_ids, **settings))
        assert abs(report.achieved_ratio / settings["ratio"] - 1) > 0.005
        assert "came no nearer" in report.allocation["notes"][-1]
    assert sum("came no nearer" in sentence for sentence in told) == 2
    report = slimllm.prune(stories_path, tmp_path / "met", config(token_ids, ratio=0.2))
    assert not report.allocation["notes"]


def test_token_ids_are_named_as_the_calibration(stories: Any, token_ids: torch.Tensor) -> None:
    report = slimllm.prune_model(stories, token_ids, PruneConfig(0.2, "slimllm"))
    assert report.calibration["text"] == report.config["calibration"] == "token ids (16, 64)"


@pytest.mark.parametrize("settings", [None, 0.2, {"ratio": 0.2}])
def test_settings_of_another_type(stories_path: Path, stories: Any, tmp_path: Path, settings: Any) -> None:
    with pytest.raises(TypeError, match="must be a PruneConfig"):
        slimllm.prune(stories_path, tmp_path / "out", settings)
    with pytest.raises(TypeError, match="must be a PruneConfig"):
        slimllm.prune_model(stories, torch.zeros(1, 2, dtype=torch.int64), settings)


def test_what_prune_model_refuses(stories: Any, token_ids: torch.Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in stories.state_dict().items()}
    with pytest.raises(TypeError, match="transformers model"):
        slimllm.prune_model("a folder", token_ids, PruneConfig(0.2, "slimllm"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tokenizer"):
        slimllm.prune_model(stories, "text", PruneConfig(0.2, "slimllm"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="dtype does not apply"):
        slimllm.prune_model(stories, token_ids, PruneConfig(0.2, "slimllm", dtype="float16"))
    with pytest.raises(InputError, match="int64 tensor"):
        slimllm.prune_model(stories, token_ids.float(), PruneConfig(0.2, "slimllm"))
    with pytest.raises(InputError, match="vocabulary has 512"):
        slimllm.prune_model(stories, token_ids + 500, PruneConfig(0.2, "slimllm"))
    with pytest.raises(InputError, match="more than this model can give"):
        slimllm.prune_model(stories, token_ids, PruneConfig(0.95, "slimllm"))
    with pytest.raises(InputError, match="not the plain llama"):
        slimllm.prune_model(stories.model, token_ids, PruneConfig(0.2, "slimllm"))
    damaged = random_llama()
    with torch.no_grad():
        damaged.model.norm.weight[0] = torch.nan
    with pytest.raises(InputError, match=r"model\.norm\.weight .*NaN"):
        slimllm.prune_model(damaged, token_ids % 128, PruneConfig(0.2, "slimllm"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in stories.state_dict().items())
