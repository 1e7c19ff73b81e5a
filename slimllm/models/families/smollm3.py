"""SmolLM3: LLaMA without a rotary embedding in some layers."""

from slimllm.models.families.base import Family, divides_hidden_size, register_family

SMOLLM3 = register_family(
    Family(
        name="smollm3",
        takes_heads=divides_hidden_size,
        stock_holds=lambda biases: biases.qkv == biases.out and biases.gate == biases.down,
    )
)
