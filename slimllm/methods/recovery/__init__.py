"""Recoveries: how what is kept makes up for what is removed, one file for each."""

from slimllm.methods.recovery.base import Fit, Recovery, register_recovery

__all__ = ["Fit", "Recovery", "register_recovery"]
