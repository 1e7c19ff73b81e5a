"""Granite 3 (dense): LLaMA with factors on embeddings, scores, what is added to the residual stream, and logits."""

from slimllm.models.families.base import Family, divides_hidden_size, register_family

GRANITE = register_family(
    Family(
        name="granite",
        update_factor="residual_multiplier",
        takes_heads=divides_hidden_size,
        stock_holds=lambda biases: biases.qkv == biases.out and biases.gate == biases.down,
    )
)
