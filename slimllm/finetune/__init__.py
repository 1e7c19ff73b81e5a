"""A short training of a pruned model by LoRA: what `slimllm finetune` does."""

from slimllm.finetune.config import FinetuneConfig
from slimllm.finetune.report import FinetuneReport
from slimllm.finetune.run import finetune

__all__ = ["FinetuneConfig", "FinetuneReport", "finetune"]
