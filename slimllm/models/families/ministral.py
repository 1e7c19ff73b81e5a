"""Ministral (2024) and Ministral 3: Mistral with sliding windows by layer, and with queries scaled by their positions."""

from slimllm.models.families.base import Family, register_family, without_biases

MINISTRAL = register_family(Family(name="ministral", stock_holds=without_biases))
MINISTRAL3 = register_family(Family(name="ministral3", stock_holds=without_biases))
