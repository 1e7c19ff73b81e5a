"""Vision-language models: the language model is pruned inside, and everything else stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORIES
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import IDS
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner
from vision_language_models import ALIKE, IMAGE, MODELS, made

import slimllm
from slimllm import InputError, PruneConfig
from slimllm.checkpoints.opening import open_checkpoint
from slimllm.cli import app
from slimllm.experiments.bench.forecast import forecast
from slimllm.export.api import export
from slimllm.finetuning import finetune
from slimllm.runtime.progress import LayerPruned


def loaded(folder: Path) -> PreTrainedModel:
    model, about = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not (about["missing_keys"] or about["unexpected_keys"] or about["mismatched_keys"])
    return model.eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}
    return found


def language_model(folder: Path) -> PreTrainedModel:
    """The language model by itself, as slimllm reads it."""
    checkpoint = open_checkpoint(folder)
    model = AutoModelForCausalLM.from_config(checkpoint.config)
    model.load_state_dict(checkpoint.read(checkpoint.shapes()), strict=False)
    return model.eval()


def seen(model: PreTrainedModel, picture: torch.Tensor) -> torch.Tensor:
    """Logits of a prompt with a picture."""
    kind = model.config.model_type
    ids = IDS[:1, :12].clone()
    ids[0, 3 : 3 + (1 if kind.startswith("qwen") else 4)] = IMAGE
    inputs: dict[str, Any] = {"input_ids": ids}
    if kind.startswith("qwen"):  # patches in order: one picture of 2 x 2 patches, which are merged to one token
        inputs |= {"pixel_values": picture.expand(2, 3, 28, 28).reshape(4, -1), "image_grid_thw": torch.tensor([[1, 2, 2]])}
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    else:
        inputs["pixel_values"] = picture[None]
    if kind == "mistral3":
        inputs["image_sizes"] = torch.tensor([[28, 28]])
    if kind == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    with torch.no_grad():
        return model(**inputs).logits


PICTURES = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("settings", [{}, {"preset": "best"}])
@pytest.mark.parametrize("name", list(MODELS))
def test_the_language_model_is_pruned_inside(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    source, out = made(name, tmp_path / "dense"), tmp_path / "out"
    report = slimllm.prune(source, out, PruneConfig(**{"ratio": 0.3, "preset": "slimllm", "calibration": IDS, **settings}))
    assert report.format == name and report.achieved_ratio == pytest.approx(0.3, rel=0.04)
    dense, pruned = loaded(source), loaded(out)
    assert report.parameters["before"] == sum(p.numel() for p in dense.parameters())
    assert report.parameters["after"] == sum(p.numel() for p in pruned.parameters())
    before, after = tensors(source), tensors(out)
    language = [one for one in before if ".layers." in one and ("language_model" in one or one.startswith("model.layers"))]
    assert all(torch.equal(before[one], after[one]) for one in set(before) - set(language))
    with torch.no_grad():
        logits = pruned(IDS).logits
        assert torch.allclose(logits, language_model(out)(IDS).logits, atol=1e-5)
    if name != "qwen2_5_vl":  # whose heads all stay
        alone = language_model(source)
        chosen = {key: report.config[key] for key in ("allocation", "recovery", "bias")}
        slimllm.prune_model(alone, IDS, PruneConfig(**{"ratio": 0.3, "preset": "slimllm", **settings, **chosen}))
        with torch.no_grad():
            assert torch.allclose(logits, alone(IDS).logits, atol=2e-4)
    # Pictures still count, and text is continued.
    one, other = (seen(pruned, picture) for picture in PICTURES)
    assert one.isfinite().all() and not torch.allclose(one, other)
    assert pruned.generate(IDS[:1, :8], max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (1, 12)


@pytest.mark.parametrize("name", list(ALIKE))
def test_others_of_the_same_kinds(name: str, tmp_path: Path) -> None:
    source, out = made(name, tmp_path / "dense"), tmp_path / "out"
    report = slimllm.prune(source, out, PruneConfig(0.3, "slimllm", calibration=IDS))
    assert report.format == name and report.achieved_ratio == pytest.approx(0.3, rel=0.04)
    with torch.no_grad():
        assert torch.allclose(loaded(out)(IDS).logits, language_model(out)(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("name", list(MODELS))
def test_nothing_changes_where_nothing_is_removed(name: str, tmp_path: Path) -> None:
    source = made(name, tmp_path / "dense")
    slimllm.prune(source, tmp_path / "out", PruneConfig(1e-6, "slimllm", calibration=IDS, recovery="none"))
    before, after = tensors(source), tensors(tmp_path / "out")
    assert set(before) == set(after) and all(torch.equal(before[one], after[one]) for one in before)
    of_pictures = [seen(loaded(folder), PICTURES[0]) for folder in (source, tmp_path / "out")]
    assert torch.allclose(*of_pictures, rtol=0, atol=1e-6)


def test_heads_stay_where_the_class_computes_their_size(tmp_path: Path, told: list[str]) -> None:
    report = slimllm.prune(
        made("qwen2_5_vl", tmp_path / "dense"), tmp_path / "out", PruneConfig(0.3, "slimllm", calibration=IDS)
    )
    assert {layer["num_heads"] for layer in report.layers} == {6}
    name = "transformers' qwen2_5_vl"
    assert f"For {name}: no heads are removed, since {name} reads qwen2 with all of them only." in told


def test_a_language_model_with_biases_becomes_another_class(tmp_path: Path) -> None:
    source = made("llava", tmp_path / "dense")
    slimllm.prune(source, tmp_path / "out", PruneConfig(0.3, "slimllm", calibration=IDS))
    assert loaded(tmp_path / "out").config.text_config.model_type == "seed_oss"
    slimllm.prune(source, tmp_path / "for", PruneConfig(0.3, "slimllm", calibration=IDS, bias="no", recovery="lstsq"))
    assert loaded(tmp_path / "for").config.text_config.model_type in ("llama", "seed_oss")
    again = slimllm.prune(tmp_path / "out", tmp_path / "again", PruneConfig(0.2, "slimllm", calibration=IDS))
    assert again.parameters["after"] < again.parameters["before"]


def test_resumed_after_an_interruption(tmp_path: Path) -> None:
    source, settings = made("gemma3", tmp_path / "dense"), PruneConfig(0.3, "slimllm", calibration=IDS)

    def stop(event: Any) -> None:
        if isinstance(event, LayerPruned) and event.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        slimllm.prune(source, tmp_path / "out", settings, progress=stop)
    assert not (tmp_path / "out").exists()
    report = slimllm.prune(source, tmp_path / "out", settings, resume=True)
    slimllm.prune(source, tmp_path / "whole", settings)
    assert report.resumed_steps > 0
    found, wanted = tensors(tmp_path / "out"), tensors(tmp_path / "whole")
    assert set(found) == set(wanted) and all(torch.equal(found[one], wanted[one]) for one in found)


def test_everywhere_else(tmp_path: Path) -> None:
    """Loading, plan, export, eval, fine-tuning, and the model in memory."""
    name = "gemma3"
    source = made(name, tmp_path / "dense", vocab_size=512)
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(source)
    (source / "preprocessor_config.json").write_text("{}")
    assert "all layers lose the same" in forecast(str(source), PruneConfig(0.3, "slimllm"), for_gpu=True).notes[0]
    ran = CliRunner().invoke(app, ["prune", str(source), "--out", str(tmp_path / "out"), "--ratio", "0.3", "--no-page"])
    assert ran.exit_code == 0, ran.output
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    assert "AutoModelForImageTextToText" in (tmp_path / "out" / "README.md").read_text()
    pruned, tokenizer = slimllm.load(tmp_path / "out")
    assert pruned.config.model_type == name and tokenizer("a")["input_ids"]
    ran = CliRunner().invoke(app, ["eval", str(source), str(tmp_path / "out"), "--max-windows", "2"])
    assert ran.exit_code == 0, ran.output
    for form in ("stock", "padded"):
        with pytest.raises(InputError, match="is a gemma3, whose classes are transformers' own"):
            export(tmp_path / "out", tmp_path / form, form)
    with pytest.raises(InputError, match="is a gemma3; only language models are fine-tuned"):
        finetune(tmp_path / "out", tmp_path / "data.jsonl", tmp_path / "tuned")
    with pytest.raises(InputError, match="contains more than a language model; save it with save_pretrained, and prune"):
        slimllm.prune_model(AutoModelForImageTextToText.from_pretrained(source), IDS, PruneConfig(0.3, "slimllm"))


def test_folders_of_other_layouts(tmp_path: Path) -> None:
    """The decoder of transformers 5 in memory, and settings of the language model among the others."""
    source = made("qwen2_5_vl", tmp_path / "dense")
    settings = json.loads((source / "config.json").read_text())
    flat = {**settings.pop("text_config"), **settings}
    (source / "config.json").write_text(json.dumps(flat))
    slimllm.prune(source, tmp_path / "flat", PruneConfig(0.3, "slimllm", calibration=IDS))
    assert loaded(tmp_path / "flat").config.text_config.intermediate_size < 96
    damaged = made("llava", tmp_path / "damaged")
    whole = tensors(damaged)

    save_file(
        {name.replace("layers.0", "layers.9"): tensor for name, tensor in whole.items()}, damaged / "model.safetensors"
    )
    with pytest.raises(InputError, match="has no language model under model"):
        slimllm.prune(damaged, tmp_path / "out", PruneConfig(0.3, "slimllm", calibration=IDS))


def test_a_language_model_of_an_unknown_family(tmp_path: Path) -> None:
    source = made("llava", tmp_path / "dense")
    settings = json.loads((source / "config.json").read_text())
    settings["text_config"] = {"model_type": "gpt2"}
    (source / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="The language model in this model is of type 'gpt2'"):
        slimllm.prune(source, tmp_path / "out", PruneConfig(0.3, "slimllm", calibration=IDS))


@pytest.mark.parametrize(
    ("gone", "sentence"),
    [("lm_head", "lm_head.weight is missing"), ("multi_modal_projector", "numbers beside the language model, but")],
)
def test_incomplete_folders(gone: str, sentence: str, tmp_path: Path) -> None:
    source = made("llava", tmp_path / "dense")
    save_file({name: one for name, one in tensors(source).items() if gone not in name}, source / "model.safetensors")
    with pytest.raises(InputError, match=sentence):
        slimllm.prune(source, tmp_path / "out", PruneConfig(0.3, "slimllm", calibration=IDS))


def test_tables_of_whole_numbers_are_copied(tmp_path: Path) -> None:
    source = made("llava", tmp_path / "dense")
    table = {"vision_tower.vision_model.embeddings.position_ids": torch.arange(5)[None]}
    save_file(tensors(source) | table, source / "model.safetensors")
    slimllm.prune(source, tmp_path / "out", PruneConfig(0.3, "slimllm", calibration=IDS))
    assert all(torch.equal(tensors(tmp_path / "out")[name], one) for name, one in table.items())
