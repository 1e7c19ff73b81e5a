"""Qwen 3 (dense): norms of the heads' queries and keys."""

from slimllm.models.families.base import Family, register_family

QWEN3 = register_family(Family(name="qwen3"))
