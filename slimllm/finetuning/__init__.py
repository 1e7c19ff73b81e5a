"""A short training of a pruned model by LoRA: what `slimllm finetune` does."""

from slimllm.finetuning.config import FinetuneConfig
from slimllm.finetuning.report import FinetuneReport
from slimllm.finetuning.run import finetune

__all__ = ["FinetuneConfig", "FinetuneReport", "finetune"]
