"""Models whose decoder layers have their own sizes: the files that are shipped inside natively pruned checkpoints.

`modeling_slim_FAMILY.py` and `slim_layers.py`, which all of them share, are all the custom code of such a checkpoint. They
import nothing of slimllm, and work with transformers 4.51 and later.
"""
