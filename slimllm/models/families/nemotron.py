"""Nemotron and Minitron: norms with means, rotary embeddings of a part of each head, and an FFN without a gate."""

from slimllm.models.families.base import Family, register_family

NEMOTRON = register_family(
    Family(
        name="nemotron", gate_proj="", stock_holds=lambda biases: biases.qkv == biases.out and biases.gate == biases.down
    )
)
