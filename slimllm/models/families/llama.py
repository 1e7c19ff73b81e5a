"""LLaMA 1 to 3 and models of the same architecture, with any scaling of the rotary embedding."""

from slimllm.models.families.base import GGUF_LAYER, GGUF_MODEL, Family, GGUFNames, divides_hidden_size, register_family

LLAMA = register_family(
    Family(
        # The same mathematics with every bias: uniform results are written as seed_oss, and can be pruned again.
        also=("seed_oss",),
        takes_heads=divides_hidden_size,
        stock_holds=lambda biases: biases.qkv == biases.out and biases.gate == biases.down,
        fits_llama=lambda config: True,
        gguf=GGUFNames("llama", GGUF_LAYER, GGUF_MODEL, adjacent_pairs=True),
    )
)
