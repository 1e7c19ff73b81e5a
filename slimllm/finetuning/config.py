"""What the user decides about a training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from slimllm.config import check_choice, check_number
from slimllm.errors import InputError


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of a training by LoRA (arXiv 2106.09685); the defaults are SlimLLM's, and LLM-Pruner's where it has none,
    but for the warm-up and the held-out examples.

    Attributes:
        rank: r of the two factors of every projection's update.
        alpha: The update is multiplied by alpha / rank.
        dropout: Dropout of what enters the factors.
        learning_rate: AdamW's at its highest: it rises linearly over the first `warmup` of all steps and falls linearly
            to 0.
        warmup: A share of all steps.
        epochs: How often every example is seen.
        batch_size: Examples of a step.
        micro_batch: Examples that pass the model at once; it changes memory, the last digits, and what the dropout
            draws.
        seq_len: Tokens of an example at most; text is cut into windows of so many.
        held_out: Examples, of the end of a seeded permutation, that are not trained on but measured; a tenth at most.
        max_steps: End after so many steps, with the learning rate at 0 then; None: after the last epoch.
        save_every: Steps from one state on the disk, from which an interrupted training is resumed, to the next.
        seed: Seed of the held-out examples, their order, the factors and the dropout.
        dtype: `float32` or `bfloat16`, what the model computes in, the factors always being float32 (float16 has no room
            for gradients); None: float32 on a CPU, bfloat16 on a GPU.
        device: `cpu`, `cuda`, …; None: a GPU if there is one.

    Raises:
        ValueError: (as InputError) a value is out of range.
        TypeError: a value has the wrong type.
    """

    rank: int = 4
    alpha: int = 16
    dropout: float = 0.05
    learning_rate: float = 1e-4
    warmup: float = 0.05
    epochs: int = 2
    batch_size: int = 16
    micro_batch: int = 4
    seq_len: int = 256
    held_out: int = 64
    max_steps: int | None = None
    save_every: int = 20
    seed: int = 0
    dtype: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("rank", 1),
            ("alpha", 1),
            ("epochs", 1),
            ("batch_size", 1),
            ("micro_batch", 1),
            ("seq_len", 2),
            ("held_out", 0),
            ("save_every", 1),
            ("seed", 0),
        ):
            check_number(name, getattr(self, name), int, least)
        if self.max_steps is not None:
            check_number("max_steps", self.max_steps, int, 1)
        for name in ("dropout", "learning_rate", "warmup"):
            check_number(name, getattr(self, name), (int, float), 0)
        if not self.learning_rate:
            raise InputError("learning_rate must be above 0, or nothing is learnt.")
        for name in ("dropout", "warmup"):
            if getattr(self, name) >= 1:
                raise InputError(f"{name} is a share and must be below 1, got {getattr(self, name)}.")
        if self.dtype is not None:
            check_choice("dtype", self.dtype, ("float32", "bfloat16"))

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON types."""
        return dataclasses.asdict(self)
