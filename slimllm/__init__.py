"""Structured pruning of large language models (SlimLLM, ICML 2025), one layer in memory at a time.

The public interface; everything else may change:

    prune(model, out, config)               a model on disk, written as a new folder
    prune_ratios(model, out, config, ratios)  the same at several ratios, with one dense pass
    prune_model(model, tokenizer, config)   a model in memory, in place
    PruneConfig(ratio=0.2, ...)             the settings
    PruneReport.read(folder)                what a run did: report.json
    load(model)                             any model, pruned or not, and its tokenizer
    perplexity(model, token_ids)            of a loaded model
    ops                                     the operations, for pruning code of your own
    InputError                              what was wrong, what was got and what to do, in one sentence
"""

import importlib.metadata

from slimllm import ops
from slimllm.config import PruneConfig
from slimllm.errors import InputError
from slimllm.evaluation.perplexity import load, perplexity
from slimllm.pruning.api import prune, prune_model, prune_ratios
from slimllm.pruning.report import PruneReport

__version__ = importlib.metadata.version("slimllm-engine")

__all__ = ["InputError", "PruneConfig", "PruneReport", "load", "ops", "perplexity", "prune", "prune_model", "prune_ratios"]
