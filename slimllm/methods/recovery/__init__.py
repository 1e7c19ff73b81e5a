"""Recoveries: how the kept units make up for the removed ones. One file for each."""

from slimllm.methods.recovery.base import Fit, Recovery, register_recovery
from slimllm.models.slicing import OutputChange

__all__ = ["Fit", "OutputChange", "Recovery", "register_recovery"]
