from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import slimllm
from slimllm import InputError, PruneConfig
from slimllm.checkpoint import open_checkpoint


def write_gguf(model: Any, path: Path, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32) -> Path:
    """A LLaMA as llama.cpp stores it: other names, rotary rows of q and k side by side."""
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens = [b"<unk>", b"<s>", b"</s>"] + [f"<0x{i:02X}>".encode() for i in range(config.vocab_size - 3)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3] + [6] * (len(tokens) - 3))
    names = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for name, tensor in state.items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            halves = tensor.view(heads, 2, tensor.shape[0] // heads // 2, -1)
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        target = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}.get(name)
        if name.startswith("model.layers."):
            _, _, index, rest = name.split(".", 3)
            target = f"blk.{index}.{names[rest.removesuffix('.weight')]}.weight"
        if target:
            data = tensor.contiguous().numpy()
            if kind != gguf.GGMLQuantizationType.F32 and tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
                writer.add_tensor(target, gguf.quants.quantize(data, kind), raw_dtype=kind)
            else:
                writer.add_tensor(target, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def gguf_path(stories: Any, tmp_path: Path) -> Path:
    return write_gguf(stories, tmp_path / "stories.gguf")


def test_gguf_holds_the_same_tensors(gguf_path: Path, stories: Any) -> None:
    checkpoint = open_checkpoint(gguf_path)
    state = stories.state_dict()
    for name, tensor in checkpoint.read(checkpoint.shapes()).items():
        assert torch.equal(tensor, state[name]), name
    assert set(checkpoint.shapes()) == set(state) - {"lm_head.weight"}


def test_gguf_loads_prunes_and_gives_the_same_as_the_folder(
    gguf_path: Path, stories_path: Path, stories: Any, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    loaded, _ = slimllm.load(gguf_path)
    with torch.no_grad():
        assert torch.allclose(loaded(token_ids[:2]).logits, stories(token_ids[:2]).logits, atol=1e-5)
    config = PruneConfig(ratio=0.3, calibration=token_ids)
    slimllm.prune(gguf_path, tmp_path / "a", config)
    slimllm.prune(stories_path, tmp_path / "b", config)
    for shard in (tmp_path / "b").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "a" / shard.name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "a")


def test_quantised_gguf_is_written_as_bfloat16(stories: Any, token_ids: torch.Tensor, tmp_path: Path) -> None:
    path = write_gguf(stories, tmp_path / "q8.gguf", gguf.GGMLQuantizationType.Q8_0)
    slimllm.prune(path, tmp_path / "out", PruneConfig(ratio=0.3, calibration=token_ids))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype="auto")
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.isfinite(model(token_ids[:1]).logits).all()


def test_damaged_gguf(gguf_path: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(gguf_path.read_bytes()[:200_000])
    with pytest.raises(InputError, match="damaged or truncated"):
        open_checkpoint(short)
    (tmp_path / "text.gguf").write_text("no GGUF at all, but longer than a header would be")
    with pytest.raises(InputError, match="cannot be read as GGUF"):
        open_checkpoint(tmp_path / "text.gguf")


def test_many_shards_give_the_same_as_one(
    stories: Any, stories_path: Path, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    stories.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    config = PruneConfig(ratio=0.3, calibration=token_ids)
    slimllm.prune(tmp_path / "sharded", tmp_path / "a", config)
    slimllm.prune(stories_path, tmp_path / "b", config)
    for shard in (tmp_path / "b").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "a" / shard.name).read_bytes()


def test_only_one_layer_is_in_memory(stories_path: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    """Tensors are read layer by layer, and what was read before is let go."""
    import weakref

    from slimllm.checkpoint import SafetensorsCheckpoint

    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    original = SafetensorsCheckpoint._read

    def counted(self: SafetensorsCheckpoint, names: list[str]) -> dict[str, torch.Tensor]:
        nonlocal most
        tensors = original(self, names)
        alive.extend(weakref.ref(tensor) for tensor in tensors.values())
        most = max(most, sum(ref() is not None for ref in alive))
        return tensors

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsCheckpoint, "_read", counted)
        slimllm.prune(stories_path, tmp_path / "out", PruneConfig(ratio=0.3, calibration=token_ids))
    assert 0 < most <= 9  # a layer has nine tensors


def test_rope_of_a_config_written_by_transformers_5(stories_path: Path, tmp_path: Path) -> None:
    """transformers 4 would take the default base without a word."""
    import json
    import shutil

    from slimllm.skeleton import meta_model

    shutil.copytree(stories_path, tmp_path / "model")
    settings = json.loads((stories_path / "config.json").read_text())
    settings["rope_parameters"]["rope_theta"] = 123.0
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    rotary = meta_model(open_checkpoint(tmp_path / "model").config).model.rotary_emb
    assert torch.allclose(rotary.inv_freq, 123.0 ** (-torch.arange(0, 8, 2) / 8))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "awq weights"),
        ({"num_attention_heads": 7}, "cannot be used|asks for"),
        ({"hidden_size": "wide"}, "cannot be used"),
        ({"hidden_act": "nonsense"}, "cannot be used"),
        ({"num_hidden_layers": 0}, "no decoder layers"),
        ({"architectures": "LlamaModel"}, "not a causal language model, but LlamaModel"),
    ],
)
def test_configurations_that_cannot_be_used(
    stories_path: Path, token_ids: torch.Tensor, tmp_path: Path, content: dict[str, Any], sentence: str
) -> None:
    import json
    import shutil

    shutil.copytree(stories_path, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
    with pytest.raises(InputError, match=sentence):
        slimllm.prune(tmp_path / "model", tmp_path / "out", PruneConfig(ratio=0.2, calibration=token_ids))
    path.write_text("[]")
    with pytest.raises(InputError, match="not a JSON object"):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("index", ["[]", '{"weight_map": []}', '{"weight_map": {"a": 5}}', "{}", "nonsense"])
def test_index_that_is_none(stories_path: Path, tmp_path: Path, index: str) -> None:
    import shutil

    shutil.copytree(stories_path, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()  # it would be read instead, as transformers does
    (tmp_path / "model" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match="no index of shards"):
        open_checkpoint(tmp_path / "model")
