"""Checkpoints with fused projections, read as equivalent ones with separate q, k, v, gate and up projections."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from slimllm.checkpoints.base import Checkpoint
from slimllm.errors import InputError
from slimllm.models.families import READ_AS, ReadAs, Rows, family_of


class FusedCheckpoint(Checkpoint):
    """A checkpoint with its fused projections split.

    Args:
        fused: The checkpoint on disk.
        reading: How to read it.
    """

    def __init__(self, fused: Checkpoint, reading: ReadAs) -> None:
        config = reading.config(fused.config)
        self._fused, self.name, self.path, self.config = fused, fused.name, fused.path, config
        rows, layers = reading.rows(config), family_of(config.model_type).layers
        self._added = {
            f"{layers}.{index}.{name}": tensor
            for name, tensor in reading.added(config).items()
            for index in range(config.num_hidden_layers)
        }
        self._places = {part: (whole, own) for whole, parts in rows.items() for part, own in parts.items()}
        self._parts = {whole: list(parts) for whole, parts in rows.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        result: dict[str, tuple[int, ...]] = {}
        for name, shape in self._fused.shapes().items():
            module, _, kind = name.rpartition(".")
            for whole, parts in self._parts.items():
                if module.endswith(f".{whole}"):
                    numbers = [_length(self._places[part][1]) for part in parts]
                    if (asked := sum(numbers)) != shape[0]:
                        raise InputError(
                            f"Tensor {name} in {self.path} has {shape[0]} rows, but its config.json asks for {asked}."
                        )
                    for part, number in zip(parts, numbers):
                        result[f"{module.removesuffix(whole)}{part}.{kind}"] = (number, *shape[1:])
                    break
            else:
                result[name] = shape
        return result | {name: tuple(tensor.shape) for name, tensor in self._added.items()}

    def storage_dtype(self, name: str) -> torch.dtype:
        if name in self._added:
            return self._added[name].dtype
        return self._fused.storage_dtype(self._place(name)[0])

    def _place(self, name: str) -> tuple[str, Rows | None]:
        """Return the stored tensor that contains one of the model's, and the rows of that one; None: all rows."""
        module, _, kind = name.rpartition(".")
        for part, (whole, rows) in self._places.items():
            if module.endswith(f".{part}"):
                return f"{module.removesuffix(part)}{whole}.{kind}", rows
        return name, None

    def _read(self, names: list[str]) -> dict[str, torch.Tensor]:
        made = {name: self._added[name].clone() for name in names if name in self._added}
        places = {name: self._place(name) for name in names if name not in made}
        stored = self._fused._read(sorted({place for place, _ in places.values()}))
        result = {}
        for name, (place, rows) in places.items():
            part = stored[place] if rows is None else stored[place][rows]
            result[name] = part.clone() if isinstance(rows, slice) else part  # a view keeps the whole tensor in memory
        return result | made

    def tokenizer(self, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
        return self._fused.tokenizer(trust_remote_code)

    def left_out(self) -> list[str]:
        return self._fused.left_out()

    def write_companions(self, folder: Path) -> None:
        self._fused.write_companions(folder)


def _length(rows: Rows) -> int:
    return int(rows.stop - rows.start) if isinstance(rows, slice) else len(rows)


def read_as(config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration that a model is read with; it is unchanged unless the model is read as another family.

    Raises:
        ValueError: (as InputError) the other family cannot represent one of the settings.
    """
    reading = READ_AS.get(config.model_type)
    return reading.config(config) if reading else config


def take_apart(checkpoint: Checkpoint) -> Checkpoint:
    """Split the fused projections of a checkpoint; return any other checkpoint unchanged."""
    reading = READ_AS.get(checkpoint.config.model_type)
    return FusedCheckpoint(checkpoint, reading) if reading else checkpoint
