"""Ministral (2024) and Ministral 3: Mistral with sliding windows by layer, and with queries scaled by their positions."""

from slimllm.models.families.base import Biases, Family, register_family


def _none(biases: Biases) -> bool:
    return not (biases.qkv or biases.out or biases.gate or biases.down)


MINISTRAL = register_family(Family(name="ministral", stock_holds=_none))
MINISTRAL3 = register_family(Family(name="ministral3", stock_holds=_none))
