"""Mistral: LLaMA with sliding windows, and no biases."""

from slimllm.models.families.base import Family, has_windows, register_family

MISTRAL = register_family(
    Family(
        name="mistral",
        stock_holds=lambda biases: not (biases.qkv or biases.out or biases.gate or biases.down),
        fits_llama=lambda config: not has_windows(config),
    )
)
