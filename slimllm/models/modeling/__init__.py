"""Modeling files that are shipped inside natively pruned checkpoints, whose decoder layers have their own sizes.

`modeling_slim_FAMILY.py` and the shared `slim_layers.py` are the only custom code of such a checkpoint. They import nothing
from slimllm, and work with transformers 4.51 and later.
"""
