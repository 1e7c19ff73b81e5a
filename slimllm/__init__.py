"""slimllm: structured pruning of large language models (SlimLLM, ICML 2025), one layer in memory at a time."""

import importlib.metadata

from slimllm import ops
from slimllm.config import PruneConfig
from slimllm.engine import prune, prune_model, prune_ratios
from slimllm.errors import InputError
from slimllm.evaluate import load, perplexity
from slimllm.report import PruneReport

__version__ = importlib.metadata.version("slimllm-engine")

__all__ = ["InputError", "PruneConfig", "PruneReport", "load", "ops", "perplexity", "prune", "prune_model", "prune_ratios"]
