"""The training loop: AdamW steps on the LoRA factors. Each step depends only on its number and the state before it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from slimllm.errors import HopelessError, InputError, exhausted
from slimllm.finetuning.config import FinetuneConfig
from slimllm.finetuning.data import Example, batch_of, learnt
from slimllm.runtime.hidden_states import State

MAX_NORM = 1.0  # largest norm of the gradient: the default of transformers' Trainer, which LLM-Pruner uses
_MOMENTS = ("exp_avg", "exp_avg_sq")  # names of AdamW's moments


class Training:
    """A model with LoRA factors, and the steps that train them.

    Args:
        model: The model, whose weights stay unchanged.
        layers: The name of its list of layers, in which all projections get factors.
        examples: The examples to train on.
        config: The settings.
        teacher: A model with the same vocabulary, such as the dense one, whose next-token distributions are learnt; None:
            the labels alone are.

    Attributes:
        num_steps: Total number of steps.
        done: Number of steps done.
        device: The model's device.
        projections: Projections with factors, by their names in the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: str,
        examples: list[Example],
        config: FinetuneConfig,
        teacher: PreTrainedModel | None = None,
    ) -> None:
        self._examples, self._config, self._teacher = examples, config, teacher
        self.device = model.device
        steps = math.ceil(len(examples) / config.batch_size)
        self.num_steps = min(steps * config.epochs, config.max_steps or steps * config.epochs)
        self.done = 0
        modules = model.get_submodule(layers).named_modules()
        targets = [f"{layers}.{name}" for name, module in modules if isinstance(module, nn.Linear)]
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=targets,
            bias="none",
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng([]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # raised because of peft
            torch.manual_seed(config.seed)  # for the factors, which are initialised on the CPU
            self.model: PeftModel = get_peft_model(model, lora)
        base: Any = self.model.base_model.model
        self.projections = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
        self._factors = {name: factor for name, factor in self.model.named_parameters() if factor.requires_grad}
        self._optimizer = torch.optim.AdamW(self._factors.values(), lr=config.learning_rate, weight_decay=0.0)

    @property
    def trainable(self) -> int:
        """Number of parameters of the factors."""
        return sum(factor.numel() for factor in self._factors.values())

    def step(self) -> tuple[float, int]:
        """Do one step; return the loss before it, in nats per learnt token, and the number of tokens in its examples.

        Raises:
            ValueError: (as HopelessError) the loss or its gradient is not finite.
        """
        self.model.eval()  # keeps the model's own dropout off, such as OPT's
        for layer in self.projections.values():
            layer.lora_dropout.train()
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
        norm = float(nn.utils.clip_grad_norm_(self._factors.values(), MAX_NORM))
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

    def update(self, projection: str) -> torch.Tensor:
        """Return the update that the factors add to a projection's weight, (out, in) fp32 on the CPU."""
        layer: Any = self.projections[projection]
        (adapter,) = layer.active_adapters
        change: torch.Tensor = layer.get_delta_weight(adapter)
        return change.detach().float().cpu()

    def state(self) -> State:
        """Return the state that `restore` resumes from: the factors and their moments."""
        tensors = dict(self._tensors())
        layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        return State(layout, (tensor.detach().cpu() for tensor in tensors.values()))

    def restore(self, state: Any, done: int) -> None:
        """Resume after `done` steps, from an open safetensors file of what `state` returned."""
        self.done = done
        for factor in self._factors.values():
            zeros = {moment: torch.zeros_like(factor) for moment in _MOMENTS}
            self._optimizer.state[factor] = {"step": torch.tensor(float(done)), **zeros}
        with torch.no_grad():
            for name, tensor in self._tensors():
                tensor.copy_(state.get_tensor(name))

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, factor in self._factors.items():
            yield name, factor
            for moment in _MOMENTS:
                yield f"{name}.{moment}", self._optimizer.state[factor][moment]

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
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            return nn.functional.log_softmax(logits[where].float(), -1)

        own = log_probabilities(self.model)
        loss = share * nn.functional.nll_loss(own, labels[:, 1:][where], reduction="sum") if share else own.new_zeros(())
        if share == 1:
            return loss
        with torch.no_grad():
            wanted = log_probabilities(self._teacher)
        return loss + (1 - share) * nn.functional.kl_div(own, wanted, reduction="sum", log_target=True)
