"""The only place that knows the names inside a model family: one row of data for each.

A decoder layer is two residual sub-layers, `h += project(inner(norm(h)))`. `inner` is the attention (or the FFN) with
its output projection taken out, and its output is what the statistics are made of.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from slimllm.errors import InputError


@dataclass(frozen=True)
class LayerSpec:
    """Names of one family's modules: full paths down to `head`, relative to the decoder layer from `attention` on.

    Attributes:
        family: Its `model_type`; `slim_` before it makes that of the native format.
        attention_post_norm, ffn_post_norm: The norm that a sub-layer's output passes before it is added to the residual
            stream; empty: none.
        before_layers: What else the residual stream needs before the first layer, an embedding of positions that are
            learned or a norm; empty: nothing.
        rotary: The rotary embedding; empty: there is none.
        slopes: A tensor with one number for each head; empty: there is none.
        ffn: The module of the FFN; empty: its parts are the layer's own, with this `activation` between up and down.
        gate_proj: Empty: the FFN has no gate.
        width: What config.json calls the FFN's width.
    """

    family: str = "llama"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    before_layers: str = ""
    final_norm: str = "model.norm"
    rotary: str = "model.rotary_emb"
    head: str = "lm_head"
    attention: str = "self_attn"
    attention_norm: str = "input_layernorm"
    attention_post_norm: str = ""
    q_proj: str = "self_attn.q_proj"
    k_proj: str = "self_attn.k_proj"
    v_proj: str = "self_attn.v_proj"
    o_proj: str = "self_attn.o_proj"
    slopes: str = ""
    ffn: str = "mlp"
    ffn_norm: str = "post_attention_layernorm"
    ffn_post_norm: str = ""
    gate_proj: str = "mlp.gate_proj"
    up_proj: str = "mlp.up_proj"
    down_proj: str = "mlp.down_proj"
    activation: str = ""
    width: str = "intermediate_size"

    @property
    def projections(self) -> tuple[str, ...]:
        """All linear layers of a decoder layer."""
        attention = self.q_proj, self.k_proj, self.v_proj, self.o_proj
        return (*attention, *self.into_ffn, self.down_proj)

    @property
    def into_ffn(self) -> tuple[str, ...]:
        """The linear layers whose outputs are the FFN's channels."""
        return (self.gate_proj, self.up_proj) if self.gate_proj else (self.up_proj,)


_GEMMA = LayerSpec(
    attention_post_norm="post_attention_layernorm",
    ffn_norm="pre_feedforward_layernorm",
    ffn_post_norm="post_feedforward_layernorm",
)

_ROWS = [
    LayerSpec(),  # LLaMA 1 to 3 and what is made like them, with any scaling of the rotary embedding
    LayerSpec(family="mistral"),
    LayerSpec(family="qwen2"),  # biases of q, k and v
    LayerSpec(family="qwen3"),  # norms of the heads' queries and keys
    replace(_GEMMA, family="gemma2"),  # four norms, soft caps, sliding windows in every other layer
    replace(_GEMMA, family="gemma3_text"),  # Qwen3's norms too, and a rotary embedding by the type of a layer
    LayerSpec(  # no gate, biases everywhere, learned positions
        family="opt",
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
    ),
    LayerSpec(  # no gate, biases everywhere, ALiBi, whose slopes stay with the heads
        family="bloom",
        layers="transformer.h",
        embedding="transformer.word_embeddings",
        before_layers="transformer.word_embeddings_layernorm",
        final_norm="transformer.ln_f",
        rotary="",
        attention="self_attention",
        q_proj="self_attention.q_proj",
        k_proj="self_attention.k_proj",
        v_proj="self_attention.v_proj",
        o_proj="self_attention.dense",
        slopes="self_attention.slopes",
        gate_proj="",
        up_proj="mlp.dense_h_to_4h",
        down_proj="mlp.dense_4h_to_h",
    ),
]

# By `model_type` of config.json. seed_oss is LLaMA's mathematics with a home for every bias: our own uniform results
# are written in it, and must be prunable again.
FAMILIES: dict[str, LayerSpec] = {
    **{row.family: row for row in _ROWS},
    **{f"slim_{row.family}": row for row in _ROWS},
    "seed_oss": _ROWS[0],
}

# Families that are read as what they compute, see `slimllm.checkpoints.base.open_checkpoint`.
READ_AS = {"phi3": "mistral", "bloom": "slim_bloom"}

EXPERTS = "its FFNs are mixtures of experts, each of which sees only some of the tokens"
_REASONS = {
    "gpt_neox": "its attention and its FFN run beside each other rather than one behind the other",
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "llama4"), EXPERTS),
    **dict.fromkeys(("gemma3", "mllama", "qwen2_vl", "qwen2_5_vl", "mistral3"), "it is more than a language model"),
}

# GGUF's names of a layer's modules (behind `blk.N.`) and of the others, and ours.
GGUF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GGUF_MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
GGUF_ARCHITECTURES = ("llama",)


def layer_spec(model_type: str) -> LayerSpec:
    """The row of a family.

    Raises:
        ValueError: (as InputError) the family is not supported; lists those that are.
    """
    if model_type not in FAMILIES and model_type not in READ_AS:
        known = ", ".join(sorted({*FAMILIES, *READ_AS}))
        reason = f" ({_REASONS[model_type]})" if model_type in _REASONS else ""
        raise InputError(f"Models of type {model_type!r} are not supported{reason}; supported types are {known}.")
    return FAMILIES[READ_AS.get(model_type, model_type)]
