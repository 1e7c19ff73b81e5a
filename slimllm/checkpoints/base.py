"""Interface of all checkpoints: lazy, checked reading. Nothing is ever unpickled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from slimllm.checkpoints.folder import name_some
from slimllm.errors import HopelessError, InputError
from slimllm.models.families import Container, Family, family_of


def all_finite(tensor: torch.Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity."""
    # Both extremes are NaN if any value is; unlike a sum, they are found without a copy.
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


class Checkpoint(ABC):
    """A model on disk: its configuration, its tensors by their Hugging Face names, its tokenizer."""

    name: str
    path: Path
    config: PretrainedConfig
    container: Container | None = None  # of a larger model that contains this one

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, from the headers alone."""

    @abstractmethod
    def storage_dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which a tensor is stored: bfloat16 if quantised; the weight's for a bias that is added."""

    def dtype_in_memory(self) -> torch.dtype:
        """Return the dtype of the weights after reading, judged by the embeddings."""
        return self.storage_dtype(f"{family_of(self.config.model_type).embedding}.weight")

    @abstractmethod
    def _read(self, names: list[str]) -> dict[str, torch.Tensor]: ...

    @abstractmethod
    def tokenizer(self, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
        """Load the tokenizer; its own code runs only if it is trusted."""

    @abstractmethod
    def write_companions(self, folder: Path) -> None:
        """Write the files that accompany the weights into a folder: tokenizer, chat templates, generation settings."""

    def beside(self) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every tensor of a larger model that contains this one; they are copied untouched."""
        return {}

    def stored_as(self, name: str) -> str:
        """Return the name under which a result stores a tensor."""
        return name

    def around(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the content of a result's config.json, given the settings of the pruned model."""
        return settings

    def left_out(self) -> list[str]:
        """Return sentences about accompanying files that are not copied."""
        return []

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read tensors, on the CPU, in the dtype in which they are stored (fp32 if quantised).

        Raises:
            ValueError: (as InputError) a tensor holds NaN or infinity, or its file cannot be read.
        """
        tensors = self._read(list(names))
        for name, tensor in tensors.items():
            if not all_finite(tensor):
                raise HopelessError(
                    f"Tensor {name} of {self.path} holds NaN or infinite values; the checkpoint is damaged."
                )
        return tensors

    def check(self, expected: dict[str, tuple[int, ...]], spec: Family) -> None:
        """Compare the headers with the configuration, before the weights are read.

        Tensors without a place in the model must have no effect: tables of the rotary embedding, biases that are zero, or
        a stored output head that equals the embeddings it is tied to.

        Args:
            expected: Names and shapes of the model's tensors.
            spec: The model's family.

        Raises:
            ValueError: (as InputError) tensors are missing, have another shape or dtype, or have no place in the model; the
                message names the first and counts the rest.
        """
        found = self.shapes()
        if missing := [name for name in expected if name not in found]:
            other = next((name for name in found if name.endswith(f".{missing[0]}")), None)
            fused = next((name for name in found if name.endswith(".experts.gate_up_proj")), None)
            advice = f"it has {other}: save the inner model alone" if other else "is the checkpoint complete?"
            advice = f"it has the experts in one tensor, {fused}: save it as it was published" if fused else advice
            raise InputError(f"{name_some(missing, 'is', 'are')} missing in {self.path}; {advice}")
        if other_shape := [name for name in expected if found[name] != expected[name]]:
            name, *more = other_shape
            others = f"; {len(more)} more do not fit either" if more else ""
            raise InputError(
                f"Tensor {name} in {self.path} has shape {found[name]}, but its config.json asks for {expected[name]}"
                f"{others}."
            )
        for name in expected:
            self.storage_dtype(name)  # raises for a quantised tensor
        unexpected = [name for name in sorted(set(found) - set(expected)) if not self._is_meaningless(name, spec)]
        if unexpected:
            raise InputError(
                f"{name_some(unexpected, 'has', 'have')} no place in the model that the configuration in {self.path} "
                "describes; leaving out weights would make the result wrong."
            )

    def _is_meaningless(self, name: str, spec: Family) -> bool:
        if name.endswith("rotary_emb.inv_freq"):  # computed from the configuration
            return True
        if name == f"{spec.head}.weight":  # a head that differs from the embeddings is untied, see `CheckpointModel`
            return self.config.tie_word_embeddings
        return name.endswith(".bias") and not self.read([name])[name].any()
