"""Recoveries: how what is kept makes up for what is removed, one file for each."""

from slimllm.methods.recovery.base import Fit, Recovery, register_recovery
from slimllm.models.slicing import OutputChange

__all__ = ["Fit", "OutputChange", "Recovery", "register_recovery"]
