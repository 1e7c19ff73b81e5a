"""A pruned model in other forms: exact, complete, and refused where something would be lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from conftest import STORIES, config, logits
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
        0.5,
        "slimllm",
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
    settings = PruneConfig(
        0.5, "slimllm", recovery="none", head_unit="query", round_to=1, calibration=IDS, allocation="uniform"
    )
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
            with pytest.raises(InputError, match="give --to padded, or prune with --for transformers"):
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
        with pytest.raises(InputError, match=f"This {family} model cannot be written as GGUF: "):
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


NO_WINDOWS = {"use_sliding_window": False, "sliding_window": None, "layer_types": None}
GEMMA3 = {
    "query_pre_attn_scalar": 16,
    "final_logit_softcapping": None,
    "num_hidden_layers": 7,
    "layer_types": [f"{'full' if index == 5 else 'sliding'}_attention" for index in range(7)],
}


def test_gguf_of_another_family(tmp_path: Path) -> None:
    """In its own architecture: norms with the 1 that Gemma adds, and rows in their own order. What it computes is compared
    in tests/downstream/test_llama_cpp.py."""
    saved(tiny("gemma3_text", vocab_size=512, **GEMMA3), tmp_path / "dense")
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(tmp_path / "dense")
    ids = IDS.clamp(max=511)
    slimllm.prune(
        tmp_path / "dense",
        tmp_path / "out",
        PruneConfig(0.3, "slimllm", allocation="uniform", recovery="lstsq", bias="no", calibration=ids),
    )
    assert export(tmp_path / "out", tmp_path / "m.gguf", "gguf") == "gemma3"
    reader, tensors = read(tmp_path / "m.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours = dict(model.named_parameters())
    assert len(tensors) == len(ours)
    for theirs, name, more in (
        ("output_norm", "model.norm", 1),
        ("blk.3.attn_norm", "model.layers.3.input_layernorm", 1),
        ("blk.3.post_attention_norm", "model.layers.3.post_attention_layernorm", 1),
        ("blk.3.ffn_norm", "model.layers.3.pre_feedforward_layernorm", 1),
        ("blk.3.post_ffw_norm", "model.layers.3.post_feedforward_layernorm", 1),
        ("blk.3.attn_q_norm", "model.layers.3.self_attn.q_norm", 1),
        ("blk.3.attn_q", "model.layers.3.self_attn.q_proj", 0),
        ("blk.3.ffn_down", "model.layers.3.mlp.down_proj", 0),
        ("token_embd", "model.embed_tokens", 0),
    ):
        assert torch.equal(tensors[f"{theirs}.weight"], ours[f"{name}.weight"].detach() + more), theirs
    settings = {name: field.contents() for name, field in reader.fields.items()}
    wanted = {"attention.sliding_window": 7, "attention.key_length": 16, "rope.freq_base": 1e6, "block_count": 7}
    assert {name: settings[f"gemma3.{name}"] for name in wanted} == wanted
    assert settings["gemma3.feed_forward_length"] == model.config.intermediate_size


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("gemma3_text", {**GEMMA3, "layer_types": ["sliding_attention"] * 7}, "full attention in every layer number 6"),
        ("gemma3_text", {**GEMMA3, "query_pre_attn_scalar": 24}, "the attention's scores by √16, and this model by √24"),
        ("gemma3_text", {**GEMMA3, "final_logit_softcapping": 2.0}, "does not cap the scores and the logits"),
        ("gemma3_text", {**GEMMA3, "hidden_activation": "gelu"}, "computes gelu_pytorch_tanh instead of gelu"),
        ("gemma2", {"final_logit_softcapping": None}, "caps the scores and the logits of every Gemma 2"),
        ("qwen3", {}, "no sliding windows for Qwen 3"),
        ("qwen3", {**NO_WINDOWS, "hidden_act": "gelu"}, "computes SiLU instead of gelu"),
        ("gemma2", {"tie_word_embeddings": False, "query_pre_attn_scalar": 16}, "output head of Gemma 2 is its embedding"),
        ("opt", {}, "it does not compute as LLaMA does"),
    ],
)
def test_gguf_is_refused_where_llama_cpp_computes_something_else(
    family: str, changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    saved(tiny(family, **changes), tmp_path / "dense")
    with pytest.raises(InputError, match=f"This {family} model cannot be written as GGUF: .*{why}"):
        export(tmp_path / "dense", tmp_path / "m.gguf", "gguf")


def test_added_tokens_of_gguf(tmp_path: Path, told: list[str]) -> None:
    """As Gemma has them: runs of spaces, which llama.cpp looks for in the text, and one that the embedding lacks."""
    shutil.copytree(STORIES, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    tokenizer["added_tokens"] += [{"id": 511, "content": "▁▁▁", **usual}, {"id": 512, "content": "<image>", **usual}]
    tokenizer["model"]["vocab"] |= {"<image>": 512}
    file.write_text(json.dumps(tokenizer))
    export(tmp_path / "model", tmp_path / "m.gguf", "gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    tokens, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    assert len(tokens) == len(types) == 512 and tokens[511] == "   "
    assert types[511] == gguf.TokenType.USER_DEFINED and "<image>" not in tokens
    assert "The embedding has no rows for these added tokens, which are left out: <image>." in told


def test_gguf_of_another_family_has_equal_sizes(tmp_path: Path) -> None:
    saved(tiny("gemma3_text", **GEMMA3), tmp_path / "dense")
    slimllm.prune(
        tmp_path / "dense", tmp_path / "out", PruneConfig(0.3, "slimllm", recovery="lstsq", bias="no", calibration=IDS)
    )
    with pytest.raises(InputError, match=r"all layers and without biases; prune with --for llama\.cpp"):
        export(tmp_path / "out", tmp_path / "m.gguf", "gguf")


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
