"""The model to export, without zero biases where a format has no place for them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import torch

from slimllm.checkpoints.base import Checkpoint
from slimllm.checkpoints.source import CheckpointModel


class ExportSource(CheckpointModel):
    """A checkpoint whose zero biases can be left out if a format has no place for them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint, torch.device("cpu"), torch.float32)
        self._all = self._shapes

    def zero_biases(self) -> list[set[str]]:
        """Return sets of biases that are 0 in every layer; an architecture has all biases of a set, or none."""
        spec = self.spec
        groups = ((spec.q_proj, spec.k_proj, spec.v_proj), (spec.o_proj,), spec.into_ffn, (spec.down_proj,))
        prefixes = [self.layer_prefix(index) for index in range(self.num_layers)]
        result = []
        for group in groups:
            names = {f"{prefix}{name}.bias" for prefix in prefixes for name in group} & set(self._all)
            if names and not any(self._read(name).any() for name in sorted(names)):
                result.append(names)
        return result

    def leave_out(self, names: set[str]) -> None:
        """Hide these tensors from now on, and no others."""
        self._shapes = {name: shape for name, shape in self._all.items() if name not in names}

    def fewer_and_fewer(self) -> Iterator[None]:
        """Present the whole model, and then every variant without some of its zero biases; yield after each change."""
        yield
        zero = self.zero_biases()
        for number in range(1, len(zero) + 1):
            for left_out in combinations(zero, number):
                self.leave_out(set().union(*left_out))
                yield
