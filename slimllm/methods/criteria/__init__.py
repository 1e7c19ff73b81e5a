"""Criteria: which units of a sub-layer are removed. One file for each."""

from slimllm.methods.criteria.base import Criterion, register_criterion

__all__ = ["Criterion", "register_criterion"]
