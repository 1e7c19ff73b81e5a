"""Models for measurements: random weights of a shape, the first layers of a model, or a copy without grouped queries."""

from __future__ import annotations

import copy
import math
import zlib
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from slimllm.checkpoints.base import Checkpoint
from slimllm.checkpoints.destination import check_space
from slimllm.checkpoints.writer import CheckpointWriter
from slimllm.errors import InputError
from slimllm.experiments.bench.shapes import Shape
from slimllm.models.families import family_of
from slimllm.models.meta import expected_tensors, meta_model

# A prime, so that no two rows of a matrix begin at the same position in the repeated numbers.
_PERIOD = 4_194_301


class RandomCheckpoint(Checkpoint):
    """Checkpoint of seeded normal weights in bfloat16, made at the speed of a copy by repeating 4 million numbers.

    Matrices have full rank, and norms are 1. The standard deviation of a matrix is 1/√inputs, and less for matrices whose
    output is added to the residual stream, so that activations neither vanish nor grow.

    Args:
        shape: The sizes.
        num_layers: Number of layers; None: all.
        seed: Seed of the numbers.
    """

    def __init__(self, shape: Shape, num_layers: int | None = None, seed: int = 0) -> None:
        self.name, self.path = shape.name, Path(shape.name)
        self.config = shape.config(num_layers)
        spec = family_of(self.config.model_type)
        self._shapes = expected_tensors(meta_model(self.config), spec)
        self._added = (spec.o_proj, spec.down_proj)
        generator = torch.Generator().manual_seed(seed)
        self._numbers = torch.randn(_PERIOD, generator=generator)
        self._scaled: dict[float, torch.Tensor] = {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def storage_dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def _read(self, names: list[str]) -> dict[str, torch.Tensor]:
        return {name: self._make(name, self._shapes[name]) for name in names}

    def _make(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        added = any(f".{projection}." in name for projection in self._added)
        spread = shape[1] ** -0.5 / (math.sqrt(2 * self.config.num_hidden_layers) if added else 1.0)
        if spread not in self._scaled:
            self._scaled[spread] = (self._numbers * spread).to(torch.bfloat16)
        numbers = self._scaled[spread]
        flat = torch.empty(math.prod(shape), dtype=torch.bfloat16)
        begin = zlib.crc32(name.encode()) % _PERIOD
        first = min(len(flat), _PERIOD - begin)
        flat[:first] = numbers[begin : begin + first]
        for start in range(first, len(flat), _PERIOD):
            part = flat[start : start + _PERIOD]
            part.copy_(numbers[: len(part)])
        return flat.view(shape)

    def tokenizer(self, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
        raise InputError(f"{self.name} has random weights and no tokenizer; give token ids, (samples, seq_len), instead.")

    def write_companions(self, folder: Path) -> None:
        """Write nothing, since there are no other files."""

    def write(self, folder: Path) -> None:
        """Write a Hugging Face folder with one shard per layer, and one for the rest."""
        prefix = f"{family_of(self.config.model_type).layers}."
        by_shard: dict[int, list[str]] = {}
        for name in self._shapes:
            layer = int(name.removeprefix(prefix).split(".")[0]) + 1 if name.startswith(prefix) else 0
            by_shard.setdefault(layer, []).append(name)
        check_space(folder, 2 * sum(math.prod(shape) for shape in self._shapes.values()))
        with CheckpointWriter(folder, len(by_shard), False, {"random weights": self.name}, {}) as writer:
            for number, names in enumerate(by_shard.values(), 1):
                writer.write_shard(number, self._read(names))
            self.config.architectures = ["LlamaForCausalLM"]
            self.config.save_pretrained(writer.folder)
            writer.complete()
            writer.finish()


class FirstLayers(Checkpoint):
    """The first layers of another checkpoint.

    Raises:
        ValueError: (as InputError) the checkpoint has fewer layers.
    """

    def __init__(self, whole: Checkpoint, num_layers: int) -> None:
        if not 1 <= num_layers <= whole.config.num_hidden_layers:
            raise InputError(f"layers must be from 1 to {whole.config.num_hidden_layers}, got {num_layers}.")
        self._whole, self.name, self.path = whole, whole.name, whole.path
        self.config = _shortened(whole.config, num_layers)
        prefix = f"{family_of(self.config.model_type).layers}."
        self._names = {
            name
            for name in whole.shapes()
            if not name.startswith(prefix) or int(name.removeprefix(prefix).split(".")[0]) < num_layers
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, shape in self._whole.shapes().items() if name in self._names}

    def storage_dtype(self, name: str) -> torch.dtype:
        return self._whole.storage_dtype(name)

    def _read(self, names: list[str]) -> dict[str, torch.Tensor]:
        return self._whole.read(names)

    def tokenizer(self, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
        return self._whole.tokenizer()

    def write_companions(self, folder: Path) -> None:
        self._whole.write_companions(folder)


def _shortened(config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    config = copy.deepcopy(config)
    config.num_hidden_layers = num_layers
    for name in ("per_layer_config", "layer_types"):
        entries = getattr(config, name, None)
        if isinstance(entries, dict):
            setattr(config, name, {layer: sizes for layer, sizes in entries.items() if int(layer) < num_layers})
        elif isinstance(entries, list):
            setattr(config, name, entries[:num_layers])
    return config


def as_mha(model: PreTrainedModel) -> LlamaForCausalLM:
    """Return an equivalent LLaMA without grouped queries: every KV head is repeated for each of its query heads."""
    config, state = model.config, model.state_dict()
    group = config.num_attention_heads // config.num_key_value_heads
    for name in [name for name in state if "k_proj" in name or "v_proj" in name]:
        heads = state[name].view(config.num_key_value_heads, config.head_dim, -1)
        state[name] = heads.repeat_interleave(group, 0).reshape(-1, *state[name].shape[1:])
    made = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "num_key_value_heads": config.num_attention_heads}))
    made.load_state_dict(state)
    return made.eval()
