"""OPT: no gate, biases everywhere, learned positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimllm.models.families.base import Family, head_dim_of, register_family

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _why_not(config: PretrainedConfig) -> str | None:
    plain = config.do_layer_norm_before and config.word_embed_proj_dim == config.hidden_size
    if plain and not config._remove_final_layer_norm and config.layer_norm_elementwise_affine:
        return None
    return (
        "This OPT model is not supported: it has norms after the sub-layers, no final norm, or embeddings whose width is "
        "not hidden_size, as only opt-350m has; prune another size of OPT."
    )


OPT = register_family(
    Family(
        name="opt",
        layers="model.decoder.layers",
        embedding="model.decoder.embed_tokens",
        before_layers="model.decoder.embed_positions",
        final_norm="model.decoder.final_layer_norm",
        rotary="",
        attention_norm="self_attn_layer_norm",
        o_proj="self_attn.out_proj",
        ffn="",
        ffn_norm="final_layer_norm",
        gate_proj="",
        up_proj="fc1",
        down_proj="fc2",
        activation="activation_fn",
        width="ffn_dim",
        why_not=_why_not,
        # OPT computes the size of a head from the number of heads.
        takes_heads=lambda config, num_heads: num_heads * head_dim_of(config) == config.hidden_size,
        stock_holds=lambda biases: biases.qkv == biases.out == biases.gate == biases.down,
    )
)
