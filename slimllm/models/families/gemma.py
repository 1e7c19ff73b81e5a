"""Gemma 2 and 3 (text): four norms per layer, soft caps, and sliding windows and rotary embeddings by layer type."""

from dataclasses import replace

from slimllm.models.families.base import Family, divides_hidden_size, register_family

GEMMA2 = register_family(
    Family(
        name="gemma2",
        attention_post_norm="post_attention_layernorm",
        ffn_norm="pre_feedforward_layernorm",
        ffn_post_norm="post_feedforward_layernorm",
        takes_heads=divides_hidden_size,
    )
)
GEMMA3_TEXT = register_family(replace(GEMMA2, name="gemma3_text"))
