"""The training loop: steps of AdamW. Each step depends only on its number and the state before it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from slimllm.errors import HopelessError, InputError, exhausted
from slimllm.finetuning.config import FinetuneConfig
from slimllm.finetuning.data import Example, batch_of, learnt
from slimllm.finetuning.trained import trained
from slimllm.runtime.hidden_states import State

MAX_NORM = 1.0  # largest norm of the gradient: the default of transformers' Trainer, which LLM-Pruner uses
_MOMENTS = ("exp_avg", "exp_avg_sq")  # names of AdamW's moments


class Training:
    """A model and the steps that train it.

    Args:
        model: The model, see `trained`.
        layers: The name of its list of layers.
        examples: The examples to train on.
        config: The settings.
        teacher: A model with the same vocabulary, such as the dense one, whose next-token distributions are learnt; None:
            the labels alone are.
        outputs: Names of the output projections in a layer.
        compute_dtype: dtype of the computation.

    Attributes:
        num_steps: Total number of steps.
        done: Number of steps done.
        device: The model's device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: str,
        examples: list[Example],
        config: FinetuneConfig,
        teacher: PreTrainedModel | None = None,
        outputs: Sequence[str] = (),
        compute_dtype: str = "float32",
    ) -> None:
        self._examples, self._config, self._teacher = examples, config, teacher
        self.device = model.device
        steps = math.ceil(len(examples) / config.batch_size)
        self.num_steps = min(steps * config.epochs, config.max_steps or steps * config.epochs)
        self.done = 0
        self._trained = trained(model, layers, outputs, config)
        self.model: Any = self._trained.model
        self._parameters = self._trained.parameters
        # Weights that are trained stay in float32, or small changes of them would be lost.
        self._autocast = torch.bfloat16 if config.train != "lora" and compute_dtype == "bfloat16" else None
        self._optimizer = torch.optim.AdamW(self._parameters.values(), lr=config.learning_rate, weight_decay=0.0)

    @property
    def trainable(self) -> int:
        """Number of parameters that are trained."""
        return sum(parameter.numel() for parameter in self._parameters.values())

    def step(self) -> tuple[float, int]:
        """Do one step; return the loss before it, in nats per learnt token, and the number of tokens in its examples.

        Raises:
            ValueError: (as HopelessError) the loss or its gradient is not finite.
        """
        self.model.eval()  # keeps the model's own dropout off, such as OPT's
        self._trained.begin_step()
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate(self.done)
        batch = self._batch(self.done)
        number = sum(len(example.ids) - max(example.given, 1) for example in batch)
        total, tokens = 0.0, 0
        self._optimizer.zero_grad()
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):  # the caller's state is kept
            torch.manual_seed((self._config.seed + 1) * 1_000_003 + self.done)  # for the dropout
            for start in range(0, len(batch), self._config.micro_batch):
                some = batch[start : start + self._config.micro_batch]
                with self._enough_memory(len(some)):
                    loss = self._loss(some) / number
                    loss.backward()
                total += float(loss.detach())
                tokens += sum(len(example.ids) for example in some)
        norm = float(nn.utils.clip_grad_norm_(self._parameters.values(), MAX_NORM))
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise HopelessError(
                f"In step {self.done + 1} the loss is {total} and the norm of its gradient {norm}; give a smaller "
                "learning_rate, or compute in float32."
            )
        self._optimizer.step()
        self.done += 1
        return total, tokens

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0: linear warm-up, then linear decay to 0 past the last step."""
        rising = max(1, round(self._config.warmup * self.num_steps))
        share = (step + 1) / rising if step < rising else (self.num_steps - step) / (self.num_steps - rising + 1)
        return self._config.learning_rate * share

    @torch.no_grad()
    def mean_loss(self, examples: list[Example]) -> float:
        """Return the mean loss of examples, in nats per learnt token."""
        self.model.eval()
        total, number = 0.0, sum(len(example.ids) - max(example.given, 1) for example in examples)
        for start in range(0, len(examples), self._config.micro_batch):
            some = examples[start : start + self._config.micro_batch]
            with self._enough_memory(len(some)):
                total += float(self._loss(some))
        if not math.isfinite(total):
            raise HopelessError("The loss of the held-out examples is not finite; compute in float32.")
        return total / number

    @property
    def tensors(self) -> set[str]:
        """Names of the model's tensors that change."""
        return self._trained.tensors

    def value(self, name: str, before: torch.Tensor) -> torch.Tensor:
        """Return the new value of one of `tensors`, fp32 on the CPU, given its value before the training."""
        return self._trained.value(name, before)

    def state(self) -> State:
        """Return the state that `restore` resumes from: the parameters and their moments."""
        tensors = dict(self._tensors())
        layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        return State(layout, (tensor.detach().cpu() for tensor in tensors.values()))

    def restore(self, state: Any, done: int) -> None:
        """Resume after `done` steps, from an open safetensors file of what `state` returned."""
        self.done = done
        for parameter in self._parameters.values():
            zeros = {moment: torch.zeros_like(parameter) for moment in _MOMENTS}
            self._optimizer.state[parameter] = {"step": torch.tensor(float(done)), **zeros}
        with torch.no_grad():
            for name, tensor in self._tensors():
                tensor.copy_(state.get_tensor(name))

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._parameters.items():
            yield name, parameter
            for moment in _MOMENTS:
                yield f"{name}.{moment}", self._optimizer.state[parameter][moment]

    def _batch(self, step: int) -> list[Example]:
        """Return the examples of a step. Each epoch goes through all examples, in its own order."""
        size, number = self._config.batch_size, len(self._examples)
        epoch, start = divmod(step, math.ceil(number / size))
        generator = torch.Generator().manual_seed((self._config.seed + 1) * 1009 + epoch)
        order = torch.randperm(number, generator=generator).tolist()
        return [self._examples[index] for index in order[start * size : (start + 1) * size]]

    @contextmanager
    def _enough_memory(self, number: int) -> Iterator[None]:
        """Raise InputError if memory runs out inside, where `number` examples are computed at once."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if (kind := exhausted(error)) is None:
                raise
            advice = "give a smaller micro_batch" if number > 1 else "give a smaller seq_len"
            raise InputError(f"The {kind} memory is not enough for {number} examples at once; {advice}.") from None

    def _loss(self, examples: list[Example]) -> torch.Tensor:
        """Return the loss summed over all learnt tokens, in nats.

        With a teacher p and this model q, a token's loss is (1 - w) KL(p ‖ q) - w log q(label).
        """
        ids, mask, labels = batch_of(examples, self.device)
        where, share = learnt(labels), 1.0 if self._teacher is None else self._config.labels

        def log_probabilities(model: Any) -> torch.Tensor:
            with torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None):
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            return nn.functional.log_softmax(logits[where].float(), -1)

        own = log_probabilities(self.model)
        loss = share * nn.functional.nll_loss(own, labels[:, 1:][where], reduction="sum") if share else own.new_zeros(())
        if share == 1:
            return loss
        with torch.no_grad():
            wanted = log_probabilities(self._teacher)
        return loss + (1 - share) * nn.functional.kl_div(own, wanted, reduction="sum", log_target=True)
