"""Mistral: LLaMA with sliding windows, and no biases."""

from slimllm.models.families.base import Family, has_windows, register_family, without_biases

MISTRAL = register_family(
    Family(name="mistral", stock_holds=without_biases, fits_llama=lambda config: not has_windows(config))
)
