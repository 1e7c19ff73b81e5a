"""Structured pruning of large language models, one layer in memory at a time.

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
from typing import TYPE_CHECKING

from slimllm._lazy import lazily

if TYPE_CHECKING:
    from slimllm import ops
    from slimllm.config import PruneConfig
    from slimllm.errors import InputError
    from slimllm.evaluation.perplexity import load, perplexity
    from slimllm.pruning.api import prune, prune_model, prune_ratios
    from slimllm.pruning.report import PruneReport

__version__ = importlib.metadata.version("slimllm-engine")

__all__ = ["InputError", "PruneConfig", "PruneReport", "load", "ops", "perplexity", "prune", "prune_model", "prune_ratios"]

# torch and transformers take seconds to import; `slimllm --help` and a wrong argument need neither.
__getattr__ = lazily(
    __name__,
    {
        "InputError": "slimllm.errors",
        "PruneConfig": "slimllm.config",
        "PruneReport": "slimllm.pruning.report",
        "load": "slimllm.evaluation.perplexity",
        "perplexity": "slimllm.evaluation.perplexity",
        "prune": "slimllm.pruning.api",
        "prune_model": "slimllm.pruning.api",
        "prune_ratios": "slimllm.pruning.api",
    },
)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
