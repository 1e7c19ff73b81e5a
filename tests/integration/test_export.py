"""A pruned model in other forms: exact, complete, and refused where something would be lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from conftest import config, logits
from tiny_models import IDS, PECULIAR, saved, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import slimllm
from slimllm import InputError, PruneConfig
from slimllm.checkpoints.gguf import _undo_rope_order
from slimllm.export.api import export
from slimllm.methods.allocation.layer_importance import LayerImportance
from slimllm.runtime.progress import PartWritten, Progress


@pytest.mark.parametrize("head_unit", ["kv-group", "query"])
@pytest.mark.parametrize("family", sorted(PECULIAR.keys() - {"bloom"}))
def test_padding_changes_nothing(family: str, head_unit: str, tmp_path: Path) -> None:
    """Layers of different heads and widths; biases only where the family's own architecture has a place for them."""
    recovery = "lstsq" if family == "llama" else "none"
    settings = PruneConfig(
        ratio=0.5,
        recovery=recovery,
        head_unit=head_unit,
        round_to=1,
        calibration=IDS,
        allocation=LayerImportance(alpha=20.0),
    )
    report = slimllm.prune(saved(tiny(family), tmp_path / "dense"), tmp_path / "out", settings)
    assert len({(one["num_heads"], one["num_kv_heads"]) for one in report.layers}) > 1
    assert export(tmp_path / "out", tmp_path / "padded", "padded") == family
    assert not list((tmp_path / "padded").glob("*.py"))
    pruned, padded = (AutoModelForCausalLM.from_pretrained(tmp_path / name).double() for name in ("out", "padded"))
    assert type(padded).__module__.startswith("transformers.models")
    assert torch.allclose(logits(padded, IDS), logits(pruned, IDS), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["gemma2", "opt"])
def test_padding_to_a_number_of_heads_that_is_taken(family: str, tmp_path: Path) -> None:
    """Gemma's must divide the hidden size, OPT's make it up; none of the layers has so many."""
    settings = PruneConfig(ratio=0.5, recovery="none", head_unit="query", round_to=1, calibration=IDS, allocation="uniform")
    model = tiny(family, num_attention_heads=6, num_key_value_heads=6, head_dim=8)
    report = slimllm.prune(saved(model, tmp_path / "dense"), tmp_path / "out", settings)
    assert len({one["num_heads"] for one in report.layers}) == 1
    heads = report.layers[0]["num_heads"]
    if family == "opt":
        with pytest.raises(InputError, match=f"opt does not take {heads} heads with a hidden size of 48; give --to padded"):
            export(tmp_path / "out", tmp_path / "stock", "stock")
    assert export(tmp_path / "out", tmp_path / "padded", "padded") == family
    pruned, padded = (AutoModelForCausalLM.from_pretrained(tmp_path / name).double() for name in ("out", "padded"))
    assert padded.config.num_attention_heads in ((6,) if family == "opt" else (2, 3, 4, 6))
    assert torch.allclose(logits(padded, IDS), logits(pruned, IDS), rtol=0, atol=1e-12)


def test_gguf_is_refused_for_another_activation(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="computes SiLU where this model has gelu"):
        export(saved(tiny("llama", hidden_act="gelu"), tmp_path / "dense"), tmp_path / "m.gguf", "gguf")


def test_biases_are_kept_or_the_export_is_refused(tmp_path: Path) -> None:
    for family, changes in (("mistral", {"sliding_window": None}), ("qwen3", {}), ("gemma2", {})):
        slimllm.prune(
            saved(tiny(family, **changes), tmp_path / "dense"), tmp_path / family, PruneConfig(ratio=0.3, calibration=IDS)
        )
        if family == "mistral":  # whose mathematics is LLaMA's
            with pytest.raises(InputError, match="give --to padded, or prune with --uniform"):
                export(tmp_path / family, tmp_path / "stock", "stock")
            assert export(tmp_path / family, tmp_path / "padded", "padded") == "seed_oss"
            models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in (family, "padded")]
            assert torch.allclose(logits(models[0], IDS), logits(models[1], IDS), atol=1e-5)
            continue
        for form in ("stock", "padded"):  # neither sends to the other
            with pytest.raises(
                InputError,
                match=rf"these projections: .*o, .*down\. transformers' {family} has no place.*the native format",
            ):
                export(tmp_path / family, tmp_path / "other", form)
        with pytest.raises(InputError, match=f"from which {family} differs by its norms or windows"):
            export(tmp_path / family, tmp_path / "m.gguf", "gguf")
        assert not (tmp_path / "other").exists() and not list(tmp_path.glob(".*"))


def test_stock_of_a_model_that_is_uniform(stories_path: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    slimllm.prune(stories_path, tmp_path / "out", config(token_ids, allocation="uniform"))
    told: list[Progress] = []
    assert export(tmp_path / "out", tmp_path / "stock", "stock", progress=told.append) == "seed_oss"
    assert told == [PartWritten(done, 5) for done in range(1, 6)]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "stock")]
    assert torch.equal(logits(models[0], token_ids), logits(models[1], token_ids))
    AutoTokenizer.from_pretrained(tmp_path / "stock")


def read(path: Path) -> tuple[gguf.GGUFReader, dict[str, torch.Tensor]]:
    reader = gguf.GGUFReader(path)
    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        tensors[tensor.name] = torch.from_numpy(values.copy()).view(shape)
    return reader, tensors


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_gguf_holds_the_model(stories_path: Path, token_ids: torch.Tensor, tmp_path: Path, dtype: str) -> None:
    report = slimllm.prune(stories_path, tmp_path / "out", config(token_ids, ratio=0.4, dtype=dtype))
    assert export(tmp_path / "out", tmp_path / "m.gguf", "gguf") == "deci"
    reader, tensors = read(tmp_path / "m.gguf")

    def field(name: str) -> Any:
        return reader.get_field(name).contents()

    assert field("deci.attention.head_count") == [layer["num_heads"] for layer in report.layers]
    assert field("deci.attention.head_count_kv") == [layer["num_kv_heads"] for layer in report.layers]
    assert field("deci.feed_forward_length") == [layer["intermediate_size"] for layer in report.layers]
    assert field("deci.context_length") == 512 and field("deci.attention.key_length") == 8
    assert field("tokenizer.ggml.model") == "llama" and field("tokenizer.ggml.bos_token_id") == 1
    assert field("tokenizer.ggml.add_bos_token") is True
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert field("tokenizer.ggml.tokens") == tokenizer.convert_ids_to_tokens(range(512))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=getattr(torch, dtype))
    ours = dict(model.named_parameters())
    for index, layer in enumerate(report.layers):
        query, key = (
            _undo_rope_order(tensors[f"blk.{index}.attn_{name}.weight"], layer[heads])
            for name, heads in (("q", "num_heads"), ("k", "num_kv_heads"))
        )
        prefix = f"model.layers.{index}."
        # Of every head llama.cpp has the two halves of each rotary pair side by side.
        theirs = tensors[f"blk.{index}.attn_q.weight"].view(layer["num_heads"], 8, 64)
        own = ours[f"{prefix}self_attn.q_proj.weight"].float().view(layer["num_heads"], 8, 64)
        assert all(torch.equal(theirs[:, 2 * i + half], own[:, i + 4 * half]) for i in range(4) for half in range(2))
        assert torch.equal(query, ours[f"{prefix}self_attn.q_proj.weight"].float())
        assert torch.equal(key, ours[f"{prefix}self_attn.k_proj.weight"].float())
        assert torch.equal(tensors[f"blk.{index}.ffn_down.weight"], ours[f"{prefix}mlp.down_proj.weight"].float())
        bias = ours.get(f"{prefix}mlp.down_proj.bias")
        assert bias is None or torch.equal(tensors[f"blk.{index}.ffn_down.bias"], bias.float())
    assert len(tensors) == len(ours)


def test_gguf_of_alike_layers_can_be_read_again(stories_path: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    settings = config(token_ids, ratio=0.5, allocation="uniform", recovery="none")
    slimllm.prune(stories_path, tmp_path / "out", settings)
    assert export(tmp_path / "out", tmp_path / "m.gguf", "gguf") == "llama"
    models = [slimllm.load(tmp_path / name, device="cpu")[0] for name in ("out", "m.gguf")]
    assert torch.allclose(logits(models[0], token_ids), logits(models[1], token_ids), atol=1e-5)


def test_nothing_is_overwritten_unasked(stories_path: Path, tmp_path: Path) -> None:
    (tmp_path / "there.gguf").write_text("mine")
    refused = [
        ("there.gguf", "gguf", "exists already"),
        ("model", "gguf", "must end with .gguf"),
        ("x", "onnx", "exporter must be one of gguf, padded, stock"),
    ]
    for place, to, words in refused:
        with pytest.raises(InputError, match=words):
            export(stories_path, tmp_path / place, to)
    with pytest.raises(InputError, match="is not a GGUF file, so it will not be overwritten"):
        export(stories_path, tmp_path / "there.gguf", "gguf", overwrite=True)
    assert (tmp_path / "there.gguf").read_text() == "mine"
    (tmp_path / "there.gguf").write_bytes(b"GGUF, an old one")
    assert export(stories_path, tmp_path / "there.gguf", "gguf", overwrite=True) == "llama"
    assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"]
