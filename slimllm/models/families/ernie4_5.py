"""ERNIE 4.5 (dense): LLaMA whose rotary embedding turns pairs of adjacent numbers, with one switch for all biases."""

from slimllm.models.families.base import Family, register_family

ERNIE4_5 = register_family(
    Family(name="ernie4_5", stock_holds=lambda biases: biases.qkv == biases.out == biases.gate == biases.down)
)
