"""Headers of safetensors files: the tensors they contain, before any of them is read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from slimllm.checkpoints.folder import LAYERS
from slimllm.errors import InputError, reason
from slimllm.models.families import FAMILIES

SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_QUANTISED_ENDINGS = (
    ".qweight",
    ".qzeros",
    ".scales",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight.absmax",
    ".SCB",
)
# Prefixes that other programs add to the names of a model's tensors.
_WRAPPERS = {"_orig_mod.": "torch.compile", "module.": "DistributedDataParallel", "base_model.model.": "peft"}


class Headers:
    """The headers of safetensors files: file, shape and dtype of every tensor.

    Attributes:
        file_of, shape_of: Files and shapes, by the tensor's stored name.
        dtype_of: dtypes as safetensors names them, by the tensor's stored name.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.file_of: dict[str, Path] = {}
        self.shape_of: dict[str, tuple[int, ...]] = {}
        self.dtype_of: dict[str, str] = {}
        for shard in files:
            try:
                with safe_open(shard, framework="pt") as file:
                    for tensor in file.keys():
                        view = file.get_slice(tensor)
                        self.file_of[tensor] = shard
                        self.shape_of[tensor] = tuple(view.get_shape())
                        self.dtype_of[tensor] = view.get_dtype()
            except (SafetensorError, OSError) as error:
                with shard.open("rb") as start:
                    if start.read(24) == b"version https://git-lfs.":
                        raise InputError(f"{shard} is a Git LFS pointer, not the file itself; run git lfs pull.") from None
                raise InputError(f"Shard {shard} cannot be read ({reason(error)}); it is damaged or truncated.") from None

    def check(self, path: Path) -> None:
        """Raise ValueError (as InputError) if names or dtypes show that the tensors are not those of a plain model."""
        for name, dtype in self.dtype_of.items():
            if name.endswith(_QUANTISED_ENDINGS):
                raise InputError(
                    f"{path} holds quantised weights ({name}, …) that its config.json does not mention; "
                    "give the unquantised model."
                )
            for prefix, wrapper in _WRAPPERS.items():
                if name.startswith(prefix) or (prefix == "_orig_mod." and prefix in name):
                    raise InputError(
                        f"The tensors in {path} have names with {prefix!r} ({name}, …), which {wrapper} adds; "
                        "save the inner model with save_pretrained."
                    )
            if dtype not in SAFETENSORS_DTYPES and (dtype.startswith("F") or name.endswith(".weight")):
                raise InputError(
                    f"Tensor {name} of {path} is stored as {dtype}; only unquantised float weights "
                    f"({', '.join(SAFETENSORS_DTYPES)}) are read."
                )

    def check_layers(self, settings: dict[str, Any], path: Path) -> None:
        """Raise ValueError (as InputError) if config.json gives more layers than there are tensors."""
        layers = next((settings[name] for name in LAYERS if settings.get(name) is not None), 0)
        if layers > len(self.file_of):
            raise InputError(
                f"config.json in {path} gives {layers:,} layers, but its files hold only {len(self.file_of)} tensors."
            )

    def is_meaningless(self, name: str) -> bool:
        """Return whether a tensor without a place in the model has no effect.

        These are tables of the rotary embedding, the causal masks of old checkpoints (`attn.bias` with four dimensions,
        and `masked_bias`), and zero biases.
        """
        if name.endswith(("rotary_emb.inv_freq", ".masked_bias")):
            return True
        if not name.endswith(".bias") or name not in self.file_of:
            return False
        if len(self.shape_of[name]) == 4:
            return True
        return not self.read(name).any()

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor by its stored name, on the CPU."""
        with safe_open(self.file_of[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor


def stored_head_differs(config: PretrainedConfig, headers: Headers) -> bool:
    """Return whether a stored output head of a supported family differs from the embeddings that the settings tie it to."""
    if config.model_type not in FAMILIES or not getattr(config, "tie_word_embeddings", False):
        return False
    names = [f"{name}.weight" for name in (FAMILIES[config.model_type].head, FAMILIES[config.model_type].embedding)]
    if not set(names) <= set(headers.file_of):
        return False
    head, embedding = (headers.read(name) for name in names)
    return not torch.equal(head, embedding)
