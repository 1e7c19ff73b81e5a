"""Allocations: how many heads and channels each layer gives, one file for each."""

from slimllm.methods.allocation.base import (
    Allocation,
    Budgets,
    DenseSublayer,
    Request,
    Wanted,
    register_allocation,
    spend_at_least_cost,
)
from slimllm.methods.allocation.budget import LayerBudget, LayerShape

__all__ = [
    "Allocation",
    "Budgets",
    "DenseSublayer",
    "LayerBudget",
    "LayerShape",
    "Request",
    "Wanted",
    "register_allocation",
    "spend_at_least_cost",
]
