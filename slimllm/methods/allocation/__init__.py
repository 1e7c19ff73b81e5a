"""Allocations: how many heads and channels each layer loses. One file for each."""

from slimllm.methods.allocation.base import (
    Allocation,
    DenseSublayer,
    Removals,
    Request,
    Wanted,
    register_allocation,
    spend_at_least_cost,
)
from slimllm.methods.allocation.removal import LayerRemoval, LayerShape

__all__ = [
    "Allocation",
    "DenseSublayer",
    "LayerRemoval",
    "LayerShape",
    "Removals",
    "Request",
    "Wanted",
    "register_allocation",
    "spend_at_least_cost",
]
