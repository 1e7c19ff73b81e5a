"""A GGUF file as a checkpoint: tensors are dequantised one by one when they are read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from slimllm.checkpoints.base import Checkpoint
from slimllm.checkpoints.gguf_file import GGUFFile, number_of
from slimllm.checkpoints.gguf_header import check_sizes
from slimllm.checkpoints.gguf_rope import ROPE_FREQS, rope_rule
from slimllm.checkpoints.safetensors import settle_tokenizer_class
from slimllm.errors import InputError, first_line
from slimllm.models.families import EXPERTS, head_dim_of
from slimllm.models.families.llama import LLAMA
from slimllm.models.modeling.slim_layers import knows_rope_parameters

_FLOAT_TYPES = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}

assert LLAMA.gguf is not None
_NAMES = LLAMA.gguf
_ARCHITECTURES = (_NAMES.architecture,)


class GGUFCheckpoint(Checkpoint):
    """A GGUF file of the LLaMA architecture, quantised or not, in one file or in parts.

    Args:
        path: The file; of a split one any part.

    Raises:
        ValueError: (as InputError) it is not a GGUF file, is damaged or incomplete, or holds another model than LLaMA.
    """

    def __init__(self, path: Path) -> None:
        self._file = GGUFFile(path)
        self.path, self.name = self._file.path, self._file.name
        architecture = self._file.settings.get("general.architecture")
        if architecture not in _ARCHITECTURES:
            raise InputError(
                f"GGUF files of architecture {architecture!r} are not supported; supported are {', '.join(_ARCHITECTURES)}."
            )
        experts = any("_exps." in name or ".ffn_gate_inp." in name for name in self._file.entries)
        if experts or number_of(self._file.settings, f"{architecture}.expert_count", 0, path) > 0:
            raise InputError(f"The model in {path} is not supported ({EXPERTS}).")
        check_sizes(self._file.settings, [entry.shape for entry in self._file.entries.values()], path)
        self._names = {_hugging_face_name(name): name for name in self._file.entries if name != ROPE_FREQS}
        try:
            with _alone(self.path) as (folder, name):
                self.config = AutoConfig.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
                self._tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
        except Exception as error:  # whatever transformers raises, the file lacks what it needs
            raise InputError(f"The configuration or tokenizer in {path} cannot be used: {first_line(error)}") from error
        for leftover in ("_model_name_or_path", "unk_token_id"):
            if hasattr(self.config, leftover):
                delattr(self.config, leftover)
        if hasattr(self.config, "sliding_window"):  # transformers makes a Mistral of a model with this name
            self.config.sliding_window = None  # which llama.cpp computes without windows
        self.config.tie_word_embeddings = "lm_head.weight" not in self._names
        self._scale_rope(architecture)

    def _scale_rope(self, architecture: str) -> None:
        """Put the scaling of the rotary embedding into the configuration, where transformers leaves it out."""
        # transformers has a base of its own where the file names none.
        default = float((getattr(self.config, "rope_parameters", None) or vars(self.config))["rope_theta"])
        theta = number_of(self._file.settings, f"{architecture}.rope.freq_base", default, self.path)
        rule = rope_rule(self._file, architecture, theta, head_dim_of(self.config))
        if rule["rope_type"] == "default":
            return
        if knows_rope_parameters():
            self.config.rope_parameters = {"rope_theta": theta, **rule}
        else:
            self.config.rope_scaling = rule

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._file.entries[theirs].shape for name, theirs in self._names.items()}

    def storage_dtype(self, name: str) -> torch.dtype:
        entries = [entry for entry in self._file.entries.values() if len(entry.shape) > 1]
        kinds = {_FLOAT_TYPES.get(entry.kind, torch.bfloat16) for entry in entries}
        # GGUF keeps norms in fp32 whatever the weights are; a model has one dtype.
        return kinds.pop() if len(kinds) == 1 else torch.bfloat16

    def dtype_in_memory(self) -> torch.dtype:
        return torch.float32

    def _read(self, names: list[str]) -> dict[str, torch.Tensor]:
        return {name: self._read_tensor(name) for name in names}

    def _read_tensor(self, name: str) -> torch.Tensor:
        tensor = self._file.read(self._names[name])
        if name.endswith(f"{LLAMA.q_proj}.weight"):
            return _undo_rope_order(tensor, self.config.num_attention_heads)
        if name.endswith(f"{LLAMA.k_proj}.weight"):
            return _undo_rope_order(tensor, self.config.num_key_value_heads)
        return tensor

    def tokenizer(self, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
        return self._tokenizer

    def write_companions(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(folder)
        settle_tokenizer_class(folder)


@contextmanager
def _alone(path: Path) -> Iterator[tuple[str, str]]:
    """Give a folder in which a file is by itself, and its name there.

    transformers would also read what lies beside the file, such as the tokenizer_config.json of another model.
    """
    with tempfile.TemporaryDirectory(prefix="slimllm-") as folder:
        (Path(folder) / "model.gguf").symlink_to(path.resolve())
        yield folder, "model.gguf"


def _hugging_face_name(name: str) -> str:
    """Ours for a tensor's name in GGUF; one that LLaMA does not have keeps its own, and is refused later on."""
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4:
        return f"{LLAMA.layers}.{parts[1]}.{_NAMES.layer.get(parts[2], parts[2])}.{parts[3]}"
    if parts[0] in _NAMES.model and len(parts) == 2:
        return f"{_NAMES.model[parts[0]]}.{parts[1]}"
    return name


def rope_order(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The rows of q or k, or their bias, as llama.cpp stores them: what `_undo_rope_order` undoes."""
    pairs = tensor.view(num_heads, 2, tensor.shape[0] // num_heads // 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _undo_rope_order(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """llama.cpp stores the rows of q and k with the rotary pairs side by side; Hugging Face, half by half."""
    pairs = weight.view(num_heads, weight.shape[0] // num_heads // 2, 2, -1)
    return pairs.transpose(1, 2).reshape(weight.shape)
