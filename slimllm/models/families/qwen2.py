"""Qwen 2 and 2.5: LLaMA with biases in q, k and v, and sliding windows by layer."""

from slimllm.models.families.base import (
    GGUF_LAYER,
    GGUF_MODEL,
    Family,
    GGUFNames,
    has_windows,
    head_dim_of,
    register_family,
    without_windows,
)

QWEN2 = register_family(
    Family(
        name="qwen2",
        # vLLM computes the size of a head from the number of heads.
        vllm_takes_heads=lambda config, num_heads: num_heads * head_dim_of(config) == config.hidden_size,
        stock_holds=lambda biases: biases.qkv and not (biases.out or biases.gate or biases.down),
        fits_llama=lambda config: not has_windows(config),
        gguf=GGUFNames("qwen2", GGUF_LAYER, GGUF_MODEL, decided=without_windows),
    )
)
