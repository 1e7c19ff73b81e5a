"""Short LoRA training of a pruned model, run by `slimllm finetune`."""

from typing import TYPE_CHECKING

from slimllm._lazy import lazily
from slimllm.finetuning.config import FinetuneConfig

if TYPE_CHECKING:
    from slimllm.finetuning.report import FinetuneReport
    from slimllm.finetuning.run import finetune

__all__ = ["FinetuneConfig", "FinetuneReport", "finetune"]

__getattr__ = lazily(  # peft, transformers and torch take seconds to import
    __name__, {"FinetuneReport": "slimllm.finetuning.report", "finetune": "slimllm.finetuning.run"}
)
