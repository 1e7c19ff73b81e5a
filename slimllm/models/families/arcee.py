"""Arcee: LLaMA with an FFN without a gate, whose activation is the square of ReLU."""

from slimllm.models.families.base import Family, register_family

ARCEE = register_family(
    Family(name="arcee", gate_proj="", stock_holds=lambda biases: biases.qkv == biases.out and biases.gate == biases.down)
)
