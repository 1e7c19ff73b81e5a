"""Sources of layers: a checkpoint, of which one layer at a time is in memory, or a model in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from slimllm.checkpoints.base import Checkpoint, all_finite
from slimllm.errors import InputError
from slimllm.models.families import FAMILIES, READ_AS, Container, family_of, head_dim_of
from slimllm.models.layer import Layer
from slimllm.models.meta import embedding_scale, empty_module, expected_tensors, meta_model
from slimllm.models.slicing import LayerSizes, Tensors, sizes_by_layer
from slimllm.runtime.memory import moved, pinned_like

_VOCABULARY = 4096  # entries of the vocabulary whose logits are in memory at a time
_LOSS_TOKENS = 2048  # tokens whose logits are in memory at a time; one window if that is longer


class ModelSource(ABC):
    """Interface between a model and the layer loop.

    `model` is the whole model, on the meta device or real; `dtype` and `device` are those of the forward passes.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self.config = model.config
        self.spec = family_of(self.config.model_type)
        self.num_layers: int = self.config.num_hidden_layers
        self.head_dim = head_dim_of(self.config)

    @property
    def container(self) -> Container | None:
        """The description of a larger model that contains this one; None: there is none."""
        return None

    def beside(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors of a larger model around this one, by the names under which they are stored."""
        return {}

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors, by full name."""

    @abstractmethod
    def weights(self, index: int) -> Tensors:
        """Return the tensors of a decoder layer as stored, by their names in the layer."""

    @abstractmethod
    def place(self, index: int, weights: Tensors) -> Layer:
        """Return a decoder layer with these weights, ready to compute."""

    reads_ahead = True

    @contextmanager
    def layers(self, first: int, read_ahead: bool) -> Iterator[Callable[[int], Layer]]:
        """Yield a function that returns the layers, ready to compute, one after the other from `first` on.

        With `read_ahead`, a thread reads the next layer's weights while the current layer computes.
        """
        if not (read_ahead and self.reads_ahead):
            yield lambda index: self.place(index, self.weights(index))
            return
        with ThreadPoolExecutor(1, "slimllm-read") as pool:
            waiting = [pool.submit(self._pinned_weights, first)] if first < self.num_layers else []

            def load(index: int) -> Layer:
                weights = waiting.pop().result()
                if index + 1 < self.num_layers:
                    waiting.append(pool.submit(self._pinned_weights, index + 1))
                return self.place(index, weights)

            yield load

    def _pinned_weights(self, index: int) -> Tensors:
        """Return the tensors of a layer, in pinned memory if the device is a GPU."""
        weights = self.weights(index)
        if self.device.type != "cuda":
            return weights
        return {name: pinned_like(weights[name]).copy_(weights.pop(name)) for name in list(weights)}

    @abstractmethod
    def embedder(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return a function from token ids (samples, seq_len) to embeddings (samples, seq_len, D); it holds the weight."""

    @abstractmethod
    def final_norm(self) -> nn.Module:
        """Return the norm before the output head, ready to compute."""

    @abstractmethod
    def head(self) -> torch.Tensor:
        """Return the weight of the output head, (vocabulary, D), as stored."""

    def sizes(self) -> list[LayerSizes]:
        """Return the sizes of every decoder layer."""
        return sizes_by_layer(self.shapes(), self.spec, self.head_dim, self.num_layers)

    def layer_prefix(self, index: int) -> str:
        return f"{self.spec.layers}.{index}."

    @torch.no_grad()
    def loss_sum(self, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
        """Return the next-token negative log-likelihood, in nats, summed over all tokens except the first of each window.

        Args:
            batches: Pairs of the outputs of the last decoder layer, (windows, seq_len, D), and the token ids, (windows,
                seq_len).
        """
        norm, weight = self.final_norm(), self.head()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for hidden, token_ids in batches:
            step = max(1, _LOSS_TOKENS // token_ids.shape[1])
            for states, ids in zip(hidden.split(step), token_ids.split(step)):
                inputs = torch.cat([norm(window[:-1].to(self.device)) for window in states])
                targets = torch.cat([window[1:] for window in ids]).to(self.device)
                total += self._losses(inputs, targets, weight).sum(dtype=torch.float64)
        return float(total)

    def _losses(self, inputs: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the losses of tokens, (tokens,), from the inputs of the output head, (tokens, D)."""
        cap: float | None = getattr(self.config, "final_logit_softcapping", None)
        divisor: float | None = getattr(self.config, "logits_scaling", None)
        normaliser = torch.full((len(targets),), -torch.inf, device=self.device)
        chosen = torch.zeros(len(targets), device=self.device)
        for start in range(0, len(weight), _VOCABULARY):  # all logits, or the converted head, would be large
            some = moved(weight[start : start + _VOCABULARY], self.device, self.dtype)
            logits = nn.functional.linear(inputs, some).float()
            if divisor:
                logits = logits / divisor
            if cap:
                logits = cap * (logits / cap).tanh()
            torch.logaddexp(normaliser, logits.logsumexp(1), out=normaliser)
            index = targets - start
            there = logits.gather(1, index.clamp(0, len(some) - 1)[:, None])[:, 0]
            chosen = torch.where((index >= 0) & (index < len(some)), there, chosen)
        return normaliser - chosen


class CheckpointModel(ModelSource):
    """A model on disk; the caller releases what is read."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        untie_if_different(checkpoint)
        super().__init__(meta_model(checkpoint.config), device, dtype)
        self.checkpoint = checkpoint
        # Only tensors with a place in the model are read or written.
        self._shapes = expected_tensors(self.model, self.spec)
        checkpoint.check(self._shapes, self.spec)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    @property
    def container(self) -> Container | None:
        return self.checkpoint.container

    def beside(self) -> dict[str, tuple[int, ...]]:
        return self.checkpoint.beside()

    def other_tensors(self) -> list[str]:
        """Return the names of all tensors outside the decoder layers."""
        return [name for name in self._shapes if not name.startswith(f"{self.spec.layers}.")]

    def weights(self, index: int) -> Tensors:
        prefix = self.layer_prefix(index)
        names = [name for name in self._shapes if name.startswith(prefix)]
        return {name.removeprefix(prefix): tensor for name, tensor in self.checkpoint.read(names).items()}

    def place(self, index: int, weights: Tensors) -> Layer:
        module = empty_module(self.model, f"{self.spec.layers}.{index}")
        layer = Layer(module, {}, self.spec, self.head_dim, self.device, self.dtype)
        layer.replace(weights)
        return layer

    def embedder(self) -> Callable[[torch.Tensor], torch.Tensor]:
        if self.spec.before_layers:
            self._fill(self.model.get_submodule(self.spec.before_layers), self.spec.before_layers)
        weight = self._read(f"{self.spec.embedding}.weight")
        scale = torch.tensor(embedding_scale(self.model, self.spec)).to(self.device, self.dtype)
        return lambda token_ids: moved(nn.functional.embedding(token_ids, weight), self.device, self.dtype) * scale

    def final_norm(self) -> nn.Module:
        norm = empty_module(self.model, self.spec.final_norm)
        self._fill(norm, self.spec.final_norm)
        return norm

    def head(self) -> torch.Tensor:
        tied = f"{self.spec.head}.weight" not in self._shapes
        return self._read(f"{self.spec.embedding if tied else self.spec.head}.weight")

    def _fill(self, module: nn.Module, name: str) -> None:
        """Load the weights of a module."""
        names = [one for one in self._shapes if one.startswith(f"{name}.")]
        tensors = {one.removeprefix(f"{name}."): moved(self._read(one), self.device, self.dtype) for one in names}
        module.load_state_dict(tensors, assign=True)

    def _read(self, name: str) -> torch.Tensor:
        return self.checkpoint.read([name])[name]


def untie_if_different(checkpoint: Checkpoint) -> None:
    """Untie a stored output head that differs from the embeddings, whatever the configuration says."""
    spec = family_of(checkpoint.config.model_type)
    head, embedding = f"{spec.head}.weight", f"{spec.embedding}.weight"
    if checkpoint.config.tie_word_embeddings and {head, embedding} <= set(checkpoint.shapes()):
        tensors = checkpoint.read([head, embedding])
        if not torch.equal(tensors[head], tensors[embedding]):
            checkpoint.config.tie_word_embeddings = False


class InMemoryModel(ModelSource):
    """A model in memory, on one device; its layers are pruned in place.

    Raises:
        ValueError: (as InputError) it is not the plain causal language model of its family, or holds NaN or infinity.
    """

    reads_ahead = False  # the weights are in memory already

    def __init__(self, model: PreTrainedModel) -> None:
        if (kind := model.config.model_type) in READ_AS:
            raise InputError(
                f"A model of type {kind} has fused projections and cannot be pruned in memory; save it "
                "with save_pretrained and prune the folder."
            )
        if kind in FAMILIES and FAMILIES[kind].expert:
            raise InputError(
                f"A model of type {kind} has the experts of a layer in one tensor and cannot be pruned in memory; save it "
                "with save_pretrained and prune the folder."
            )
        plain = {name: type(module) for name, module in meta_model(model.config).named_modules() if name}
        found = {name: type(module) for name, module in model.named_modules() if name}
        if found != plain:
            different = sorted(name for name in {**plain, **found} if plain.get(name) != found.get(name))
            raise InputError(
                f"The model is not the plain {model.config.model_type} causal language model that can be pruned in place: "
                f"{different[0]} differs; load it with AutoModelForCausalLM, and merge adapters first."
            )
        for name, parameter in model.named_parameters():
            if not all_finite(parameter.detach()):
                raise InputError(f"Parameter {name} of the model holds NaN or infinite values.")
        dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
        if len(dtypes) > 1:
            raise InputError(
                f"The model has parameters in {' and '.join(dtypes)}; give all one dtype, such as model.to(torch.float32)."
            )
        embedding = model.get_input_embeddings().weight
        super().__init__(model, embedding.device, embedding.dtype)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return expected_tensors(self.model, self.spec)

    def weights(self, index: int) -> Tensors:
        module = self.model.get_submodule(f"{self.spec.layers}.{index}")
        return {name: tensor.detach() for name, tensor in module.state_dict().items()}

    def place(self, index: int, weights: Tensors) -> Layer:
        module = self.model.get_submodule(f"{self.spec.layers}.{index}")
        return Layer(module, weights, self.spec, self.head_dim, self.device, self.dtype)

    def embedder(self) -> Callable[[torch.Tensor], torch.Tensor]:
        embedding = self.model.get_input_embeddings()
        return lambda token_ids: embedding(token_ids.to(self.device))

    def final_norm(self) -> nn.Module:
        return self.model.get_submodule(self.spec.final_norm)

    def head(self) -> torch.Tensor:
        weight: torch.Tensor = self.model.get_output_embeddings().weight
        return weight
