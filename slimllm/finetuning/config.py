"""Settings of a training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from slimllm.checks import check_choice, check_number
from slimllm.errors import InputError


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of a training.

    The defaults are SlimLLM's, or LLM-Pruner's where SlimLLM gives none, except for the warm-up and the held-out examples.

    Attributes:
        train: What is trained, in all layers: `lora`, two factors beside every projection (arXiv 2106.09685); `output`, the
            output projections, norms and biases; `all`, all weights. The embeddings and the output head stay as they are.
            Without `lora`, a trained weight takes 16 bytes of memory, and any other 4.
        rank: With `lora`: rank r of the two factors of every projection's update.
        alpha: With `lora`: the update is multiplied by alpha / rank.
        dropout: With `lora`: dropout rate at the input of the factors.
        learning_rate: Peak learning rate of AdamW. It rises linearly during the warm-up, and then falls linearly to 0.
        warmup: Share of all steps that the warm-up takes.
        epochs: Number of passes over the examples.
        batch_size: Examples in a step.
        micro_batch: Examples in a forward pass. It changes memory, the last digits, and the random draws of the dropout.
        seq_len: Maximum number of tokens in an example; text is cut into windows of this length.
        held_out: Number of examples, from the end of a seeded permutation, that are measured and not trained on; at most a
            tenth of all.
        max_steps: Number of steps after which the training ends, with the learning rate at 0; the default is all epochs.
        save_every: Steps between two states on the disk, from which an interrupted training is resumed.
        labels: Share of the labels' loss where a teacher is given; the rest is the divergence from the teacher. Without a
            teacher the labels are all of it.
        seed: Seed of the choice of held-out examples, the order of examples, the factors and the dropout.
        dtype: dtype of the model's computation, `float32` or `bfloat16`; the default is float32 on a CPU and bfloat16 on a
            GPU. What is trained is always float32. The range of float16 is too small for gradients.
        device: cpu, cuda, …; the default is a GPU if there is one.

    Raises:
        ValueError: (as InputError) a value is out of range.
        TypeError: a value has the wrong type.
    """

    train: str = "lora"
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
    labels: float = 0.0
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
        check_choice("train", self.train, ("lora", "output", "all"))
        if self.max_steps is not None:
            check_number("max_steps", self.max_steps, int, 1)
        for name in ("dropout", "learning_rate", "warmup", "labels"):
            check_number(name, getattr(self, name), (int, float), 0)
        if not self.learning_rate:
            raise InputError("learning_rate must be above 0, or nothing is learnt; got 0.")
        for name in ("dropout", "warmup"):
            if getattr(self, name) >= 1:
                raise InputError(f"{name} is a share and must be below 1, got {getattr(self, name)}.")
        if self.labels > 1:
            raise InputError(f"labels is a share and must be at most 1, got {self.labels}.")
        if self.dtype is not None:
            check_choice("dtype", self.dtype, ("float32", "bfloat16"))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON types."""
        return dataclasses.asdict(self)
