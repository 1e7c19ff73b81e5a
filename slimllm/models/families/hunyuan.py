"""Hunyuan (dense): norms on the rotated queries and keys of each head."""

from slimllm.models.families.base import Family, register_family

HUNYUAN = register_family(Family(name="hunyuan_v1_dense"))
