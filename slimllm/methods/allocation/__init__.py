"""Allocations: how many heads and channels each layer gives, one file for each."""

from slimllm.methods.allocation.base import (
    Allocation,
    Budgets,
    DenseSublayer,
    Request,
    register_allocation,
    spend_at_least_cost,
)

__all__ = ["Allocation", "Budgets", "DenseSublayer", "Request", "register_allocation", "spend_at_least_cost"]
