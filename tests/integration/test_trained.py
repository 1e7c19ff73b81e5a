"""Training of the layers' own weights: which change, how, and that an interrupted training becomes what it would be."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORIES, contents, stop_at
from safetensors.torch import load_file
from tiny_models import COMMON, of_this_version, saved
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from slimllm import InputError, load
from slimllm.finetuning import FinetuneConfig, FinetuneReport, finetune
from slimllm.finetuning.data import read_examples
from slimllm.finetuning.train import Training

QUICK: dict[str, Any] = {"seq_len": 32, "max_steps": 4, "save_every": 2, "learning_rate": 1e-3, "held_out": 8}
OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")


def is_changed(name: str, train: str) -> bool:
    output = name.endswith(tuple(f"{output}.weight" for output in OUTPUTS)) or "norm" in name or name.endswith(".bias")
    return ".layers." in name and (train == "all" or output)


@pytest.mark.parametrize("train", ["output", "all"])
def test_what_changes(train: str, pruned: Path, text: Path, tmp_path: Path) -> None:
    report = finetune(pruned, text, tmp_path / "out", FinetuneConfig(**QUICK, train=train))
    trainable = 0
    for shard in sorted(pruned.glob("*.safetensors")):
        old, new = load_file(shard), load_file(tmp_path / "out" / shard.name)
        assert old.keys() == new.keys()
        for name in old:
            assert torch.equal(old[name], new[name]) != is_changed(name, train), name
            trainable += old[name].numel() * is_changed(name, train)
    assert report.trainable == trainable and report.held_out[-1][1] < report.held_out[0][1] - 0.02
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("By training all weights of the layers" if train == "all" else "By training the layers' output proj") in card
    loaded, tokenizer = load(tmp_path / "out")
    examples = read_examples(text, tokenizer, 32)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    windows = torch.tensor([examples[index].ids for index in order[-8:]])
    with torch.no_grad():
        loss = float(loaded(windows, labels=windows).loss)
    assert loss == pytest.approx(report.held_out[-1][1], abs=1e-4)


@pytest.mark.parametrize("step", [1, 2])
def test_interrupted(step: int, pruned: Path, text: Path, tmp_path: Path) -> None:
    settings = FinetuneConfig(**QUICK, train="output")
    finetune(pruned, text, tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        finetune(pruned, text, tmp_path / "out", settings, progress=stop_at("train", step))
    with pytest.raises(InputError, match="had another train"):
        finetune(pruned, text, tmp_path / "out", FinetuneConfig(**QUICK, train="all"), resume=True)
    finetune(pruned, text, tmp_path / "out", settings, resume=True)
    one, two = (contents(tmp_path / name) for name in ("whole", "out"))
    assert all(one[name] == two[name] for name in one if name != "finetune.json") and one.keys() == two.keys()


def test_a_step_by_hand(pruned: Path, text: Path) -> None:
    """The first step of AdamW moves every weight whose gradient is not 0 by the learning rate, against its sign."""
    model, tokenizer = load(pruned)
    examples = read_examples(text, tokenizer, 32)[:16]
    training = Training(model, "model.layers", examples, FinetuneConfig(seq_len=32, train="output"), outputs=OUTPUTS)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    training.step()
    for name, parameter in model.named_parameters():
        moved = before[name] - parameter.detach()
        if is_changed(name, "output"):
            there = parameter.grad.abs() > 1e-5
            assert bool(there.any()) and bool((parameter.grad.sign() == moved.sign())[there].all()), name
            assert moved[there].abs().max() == pytest.approx(1e-4, rel=1e-2), name
        else:
            assert parameter.grad is None and not bool(moved.any()), name


def test_in_bfloat16_the_weights_are_float32(pruned: Path, text: Path, tmp_path: Path) -> None:
    """Steps of 1e-5 would be lost in bfloat16."""
    quick = {**QUICK, "learning_rate": 1e-5}
    report = finetune(pruned, text, tmp_path / "out", FinetuneConfig(**quick, train="output", dtype="bfloat16"))
    exact = finetune(pruned, text, tmp_path / "exact", FinetuneConfig(**quick, train="output"))
    assert report.compute_dtype == "bfloat16" and report.loss != exact.loss
    assert report.loss == pytest.approx(exact.loss, rel=0.01)
    name = "model.layers.0.mlp.down_proj.weight"
    before, found, wanted = (
        next(tensors[name] for shard in folder.glob("*.safetensors") if name in (tensors := load_file(shard)))
        for folder in (pruned, tmp_path / "out", tmp_path / "exact")
    )
    assert 0 < (found - wanted).norm() < 0.5 * (wanted - before).norm()


@pytest.mark.parametrize("train", ["lora", "output", "all"])
def test_fused_projections_are_refused(train: str, text: Path, tmp_path: Path) -> None:
    """Their parts would be written beside a configuration that has them in one piece."""
    settings = {**COMMON, "vocab_size": 512}
    del settings["head_dim"]
    saved(AutoModelForCausalLM.from_config(AutoConfig.for_model("phi3", **of_this_version(settings))), tmp_path / "phi")
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(tmp_path / "phi")
    with pytest.raises(InputError, match="combines several projections in one matrix; prune the model first"):
        finetune(tmp_path / "phi", text, tmp_path / "out", FinetuneConfig(**QUICK, train=train))
    assert not (tmp_path / "out").exists()


def test_settings(pruned: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"train must be one of lora, output, all, got .?head"):
        FinetuneConfig(train="head")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="LoRA needs peft, which is not installed"):
        finetune(pruned, text, tmp_path / "out", FinetuneConfig(**QUICK))
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        monkeypatch.setitem(sys.modules, name, None)
    finetune(pruned, text, tmp_path / "out", FinetuneConfig(**QUICK, train="output"))
    assert FinetuneReport.read(tmp_path / "out").config["train"] == "output"
