"""What an export leaves out and what it refuses to: by the values of tensors, not by their names."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import call
from conftest import STORIES, config, logits, random_llama
from safetensors.torch import load_file, save_file
from tiny_models import saved, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import slimllm
from slimllm import InputError, PruneConfig
from slimllm.export.api import export

IDS = torch.randint(3, 96, (12, 24), generator=torch.Generator().manual_seed(0))
Tensors = dict[str, torch.Tensor]


def change_weights(folder: Path, change: Callable[[Tensors], Tensors | None]) -> None:
    """Do something to the tensors in every shard of a folder; or give those to take their place."""
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        save_file(change(tensors) or tensors, shard, metadata={"format": "pt"})


def zero(*endings: str) -> Callable[[Tensors], None]:
    """What makes tensors 0 whose names end so."""

    def change(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith(endings):
                tensors[name].zero_()

    return change


@pytest.mark.parametrize("to", ["stock", "padded", "gguf"])
def test_tensors_that_change_nothing_are_left_out(token_ids: torch.Tensor, tmp_path: Path, to: str) -> None:
    shutil.copytree(STORIES, tmp_path / "model")
    more = {
        "lm_head.weight": load_file(STORIES / "model.safetensors")["model.embed_tokens.weight"].clone(),
        "lm_head.bias": torch.zeros(512),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.rotary_emb.inv_freq": torch.ones(4),
    }
    change_weights(tmp_path / "model", lambda tensors: tensors | more)
    out = tmp_path / ("m.gguf" if to == "gguf" else "out")
    assert export(tmp_path / "model", out, to) == "llama"
    models = [slimllm.load(path, device="cpu")[0] for path in (STORIES, out)]
    assert torch.allclose(logits(models[0], token_ids), logits(models[1], token_ids), atol=1e-5)


@pytest.mark.parametrize("to", ["stock", "gguf"])
@pytest.mark.parametrize("name", ["lm_head.bias", "model.extra.weight"])
def test_tensors_that_change_something_are_not(tmp_path: Path, to: str, name: str) -> None:
    shutil.copytree(STORIES, tmp_path / "model")
    tensor = torch.zeros(512)
    tensor[-1] = 1e-3 if name.endswith("bias") else 0  # of a weight it is not known what zeros would do
    change_weights(tmp_path / "model", lambda tensors: tensors | {name: tensor})
    with pytest.raises(InputError, match=f"Tensor {name} has no place in the model"):
        export(tmp_path / "model", tmp_path / "out.gguf", to)


@pytest.mark.parametrize(
    ("family", "needed"), [("mistral", ""), ("qwen2", "k_proj.bias"), ("qwen3", "o_proj.bias"), ("gemma2", "o_proj.bias")]
)
def test_biases_of_zero_need_no_place(family: str, needed: str, tmp_path: Path) -> None:
    """Of down_proj, and of o_proj where the architecture has none; as soon as one number is another, they need it."""
    slimllm.prune(
        saved(tiny(family), tmp_path / "dense"),
        tmp_path / "out",
        PruneConfig(0.4, "slimllm", allocation="uniform", calibration=IDS),
    )
    endings = ("down_proj.bias",) if needed == "o_proj.bias" else ("down_proj.bias", "o_proj.bias")
    change_weights(tmp_path / "out", zero(*endings))
    for to in ("stock", "padded"):
        assert export(tmp_path / "out", tmp_path / to, to) == family
        models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", to)]
        assert torch.allclose(logits(models[0], IDS), logits(models[1], IDS), atol=1e-5)
        names = {name for shard in (tmp_path / to).glob("*.safetensors") for name in load_file(shard)}
        assert not any(name.endswith(endings) for name in names)
        assert not needed or any(name.endswith(needed) for name in names)
        shutil.rmtree(tmp_path / to)

    def one(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith("2.mlp.down_proj.bias"):
                tensors[name][5] = 1e-6

    change_weights(tmp_path / "out", one)
    with pytest.raises(InputError, match=f"biases of these projections: .*down. transformers' {family} has no place"):
        export(tmp_path / "out", tmp_path / "stock", "stock")


def test_a_place_that_must_be_filled_is_filled(tmp_path: Path) -> None:
    """Qwen2 has biases of q, k and v; if they are 0, they are written all the same."""
    folder = saved(tiny("qwen2"), tmp_path / "dense")
    change_weights(folder, zero(".bias"))
    slimllm.prune(folder, tmp_path / "out", PruneConfig(0.4, "slimllm", allocation="uniform", calibration=IDS))
    change_weights(tmp_path / "out", zero(".bias"))
    assert export(tmp_path / "out", tmp_path / "stock", "stock") == "qwen2"
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "stock")]
    assert torch.allclose(logits(models[0], IDS), logits(models[1], IDS), atol=1e-5)


def test_bloom_without_biases_is_no_stock_bloom(tmp_path: Path) -> None:
    """Its slopes would be lost."""
    folder = saved(tiny("bloom"), tmp_path / "dense")
    change_weights(folder, zero("proj.bias", "dense.bias", "_h.bias"))
    with pytest.raises(InputError, match="slopes of its position bias"):
        export(folder, tmp_path / "stock", "stock")


def llama_with_biases(folder: Path) -> Path:
    """Pruned to fewer heads, with biases everywhere."""
    model = random_llama(vocab_size=512)
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(folder / "dense")
    ids = torch.randint(3, 512, (12, 32), generator=torch.Generator().manual_seed(0))
    slimllm.prune(saved(model, folder / "dense"), folder / "out", config(ids, ratio=0.4, allocation="uniform"))
    return folder / "out"


def test_gguf_without_biases_of_zero(tmp_path: Path) -> None:
    out = llama_with_biases(tmp_path)
    with pytest.raises(InputError, match="no place for the biases of q, k and v"):
        export(out, tmp_path / "m.gguf", "gguf")
    change_weights(out, zero("q_proj.bias", "k_proj.bias", "v_proj.bias"))
    assert export(out, tmp_path / "deci.gguf", "gguf") == "deci"
    change_weights(out, zero(".bias"))
    assert export(out, tmp_path / "m.gguf", "gguf") == "llama"
    ids = torch.randint(3, 512, (2, 32), generator=torch.Generator().manual_seed(1))
    models = [slimllm.load(path, device="cpu")[0] for path in (out, tmp_path / "m.gguf")]
    assert torch.allclose(logits(models[0], ids), logits(models[1], ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("hidden", "intermediate", "words"),
    [
        (256, 512, None),
        (256, 288, "^2 of 16 matrices .* multiple of 256, .*; --round-to 256 when pruning .*, which helps 2 of them"),
        (256, 72, r"^2 of 16 .*, and leaves 2, whose rows are not a multiple of 32 either, in 16 bits\.$"),
        (288, 512, r"^14 of 16 matrices have rows .* to larger types for them\.$"),
    ],
)
def test_rows_that_llama_cpp_cannot_quantise(
    tmp_path: Path, hidden: int, intermediate: int, words: str | None, told: list[str]
) -> None:
    """Two layers with embeddings and a head: 16 matrices, 2 of which have the FFN's width."""
    model = random_llama(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        head_dim=32,
        num_attention_heads=hidden // 32,
        num_key_value_heads=1,
        attention_bias=False,
        mlp_bias=False,
    )
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(tmp_path / "dense")
    export(saved(model, tmp_path / "dense"), tmp_path / "m.gguf", "gguf")
    if words is None:
        assert not told
    else:
        (sentence,) = told
        assert re.search(words, sentence), sentence
    export(tmp_path / "dense", tmp_path / "stock", "stock")
    assert told[(words is not None) :] == [told[-1]] and told[-1].startswith("tensor parallel:")  # nothing on rows


def test_the_command_line_says_it_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        code, out, err = call(capsys, "export", STORIES, "--to", "gguf", "--out", tmp_path / "m.gguf")
    assert code == 0 and not err and not caplog.records  # of the libraries; slimllm's own are printed
    assert "36 of 36 matrices have rows" in " ".join(out.split())
    assert call(capsys, "export", STORIES, "--to", "gguf", "--out", tmp_path / "n.gguf", "--quiet")[1] == ""
