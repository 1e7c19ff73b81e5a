"""Short LoRA training of a pruned model, run by `slimllm finetune`."""

from slimllm.finetuning.config import FinetuneConfig
from slimllm.finetuning.report import FinetuneReport
from slimllm.finetuning.run import finetune

__all__ = ["FinetuneConfig", "FinetuneReport", "finetune"]
