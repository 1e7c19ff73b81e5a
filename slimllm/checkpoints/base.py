"""What every checkpoint offers: lazy, checked reading. Nothing is ever unpickled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from slimllm.checkpoints.folder import name_some
from slimllm.errors import HopelessError, InputError
from slimllm.models.families import Family, family_of


class Checkpoint(ABC):
    """A model on disk: its configuration, its tensors by their Hugging Face names, its tokenizer."""

    name: str
    path: Path
    config: PretrainedConfig

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, from the headers alone."""

    @abstractmethod
    def storage_dtype(self, name: str) -> torch.dtype:
        """dtype in which a tensor is stored, bfloat16 if quantised; of a bias that is new, that of its weight."""

    def dtype_in_memory(self) -> torch.dtype:
        """What the weights are once they are read, by the embeddings."""
        return self.storage_dtype(f"{family_of(self.config.model_type).embedding}.weight")

    @abstractmethod
    def _read(self, names: list[str]) -> dict[str, torch.Tensor]: ...

    @abstractmethod
    def tokenizer(self, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
        """Load the tokenizer; code that comes with it runs only if it is trusted."""

    @abstractmethod
    def write_companions(self, folder: Path) -> None:
        """Put what comes along with the weights into a folder: tokenizer, chat templates, generation settings."""

    def left_out(self) -> list[str]:
        """Sentences about what should come along but does not."""
        return []

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The tensors, on the CPU, as they are stored (fp32 if quantised).

        Raises:
            ValueError: (as InputError) a tensor holds NaN or infinity, or its file cannot be read.
        """
        tensors = self._read(list(names))
        for name, tensor in tensors.items():
            # Either of them is NaN if any value is; and unlike a sum they are found without a copy.
            if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
                raise HopelessError(
                    f"Tensor {name} of {self.path} holds NaN or infinite values; the checkpoint is damaged."
                )
        return tensors

    def check(self, expected: dict[str, tuple[int, ...]], spec: Family) -> None:
        """Compare the headers with what the configuration says, before any weight is read.

        What a checkpoint holds besides must be without meaning: tables of the rotary embedding, biases that are zero, a
        stored output head that equals the embeddings it is tied to.

        Args:
            expected: Names and shapes of the model's tensors.
            spec: Names of its family.

        Raises:
            ValueError: (as InputError) tensors are missing, have another shape or dtype, or have no place in the model; the
                sentence names the first and counts the rest.
        """
        found = self.shapes()
        if missing := [name for name in expected if name not in found]:
            other = next((name for name in found if name.endswith(f".{missing[0]}")), None)
            advice = f"it has {other}: save the model inside of that one" if other else "is the checkpoint complete?"
            raise InputError(f"{name_some(missing, 'is', 'are')} missing in {self.path}; {advice}")
        if other_shape := [name for name in expected if found[name] != expected[name]]:
            name, *more = other_shape
            others = f"; {len(more)} more do not fit either" if more else ""
            raise InputError(
                f"Tensor {name} in {self.path} has shape {found[name]}, but its config.json asks for {expected[name]}"
                f"{others}."
            )
        for name in expected:
            self.storage_dtype(name)  # refuses what is quantised
        unexpected = [name for name in sorted(set(found) - set(expected)) if not self._is_meaningless(name, spec)]
        if unexpected:
            raise InputError(
                f"{name_some(unexpected, 'has', 'have')} no place in the model that the configuration in {self.path} "
                "describes; left out, the result would be wrong."
            )

    def _is_meaningless(self, name: str, spec: Family) -> bool:
        if name.endswith("rotary_emb.inv_freq"):  # it follows from the configuration
            return True
        if name == f"{spec.head}.weight":  # one that differs from the embeddings is not tied, see `CheckpointModel`
            return self.config.tie_word_embeddings
        return name.endswith(".bias") and not self.read([name])[name].any()
