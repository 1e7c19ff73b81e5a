"""StarCoder 2: norms with means, an FFN without a gate, and one switch for all biases."""

from slimllm.models.families.base import Family, divides_hidden_size, register_family

STARCODER2 = register_family(
    Family(
        name="starcoder2",
        gate_proj="",
        up_proj="mlp.c_fc",
        down_proj="mlp.c_proj",
        takes_heads=divides_hidden_size,
        stock_holds=lambda biases: biases.qkv == biases.out == biases.gate == biases.down,
    )
)
