"""Structured pruning of large language models (SlimLLM, ICML 2025), one layer in memory at a time.

The public interface; everything else may change:

    prune(model, out, config)               prune a model on disk, and write it to a new folder
    prune_ratios(model, out, config, ratios)  the same at several ratios, with one dense pass
    prune_model(model, tokenizer, config)   prune a model in memory, in place
    PruneConfig(ratio=0.2, ...)             settings of a run
    PruneReport.read(folder)                report of a run, from report.json
    load(model)                             load any model, pruned or not, and its tokenizer
    perplexity(model, token_ids)            perplexity of a loaded model
    ops                                     operations, for your own pruning code
    InputError                              error of the input: what was wrong, what was got and what to do
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
