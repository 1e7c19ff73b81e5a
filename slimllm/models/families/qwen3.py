"""Qwen 3 (dense): norms on the queries and keys of each head."""

from slimllm.models.families.base import Family, register_family

QWEN3 = register_family(Family(name="qwen3"))
