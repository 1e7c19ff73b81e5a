"""Apertus: no gate, an activation with weights of its own, and norms on the queries and keys of each head."""

from slimllm.models.families.base import Family, register_family

APERTUS = register_family(
    Family(name="apertus", attention_norm="attention_layernorm", ffn_norm="feedforward_layernorm", gate_proj="")
)
