"""Writer of GGUF files as llama.cpp stores models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np


def write_gguf(
    model: Any,
    path: Path,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    *,
    settings: dict[str, str | int | float] | None = None,
    more: dict[str, np.ndarray[Any, Any]] | None = None,
    tensors_in_a_part: int = 0,
    architecture: str = "llama",
) -> Path:
    """Write a LLaMA as llama.cpp stores it: with its names, and rotary rows of q and k interleaved.

    Args:
        model: The model.
        path: The file to write.
        kind: Type of the matrices whose rows are multiples of 32; all other tensors are fp32.
        settings: Additional metadata, by key.
        more: Additional tensors, by name.
        tensors_in_a_part: Maximum number of tensors in each of several files; 0: one file.
        architecture: Name of the architecture.
    """
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_in_a_part)
    adders = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
    for key, value in (settings or {}).items():
        adders[type(value)](key, value)
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if "llama.rope.freq_base" not in (settings or {}):
        writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens = [b"<unk>", b"<s>", b"</s>"] + [f"<0x{i:02X}>".encode() for i in range(config.vocab_size - 3)]
    writer.add_tokenizer_model("llama")
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3] + [6] * (len(tokens) - 3))
    names = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
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
