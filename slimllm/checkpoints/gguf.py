"""GGUF files as checkpoints: tensors are dequantised one by one when they are read."""

from __future__ import annotations

import importlib.metadata
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
from slimllm.models.families import FAMILIES, head_dim_of
from slimllm.models.modeling.slim_layers import knows_rope_parameters

_FLOAT_TYPES = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}

if not hasattr(gguf, "__version__"):  # with Python 3.10, transformers finds the version only there
    gguf.__version__ = importlib.metadata.version("gguf")

# Families by their architecture in GGUF.
_FAMILIES = {spec.gguf.architecture: spec for spec in FAMILIES.values() if spec.gguf}


class GGUFCheckpoint(Checkpoint):
    """A GGUF file of LLaMA's or another known architecture, quantised or not, in one file or in parts.

    Args:
        path: The file, or any part of a split one.

    Raises:
        ValueError: (as InputError) it is not a GGUF file, is damaged or incomplete, or is of another architecture.
    """

    def __init__(self, path: Path) -> None:
        self._file = GGUFFile(path)
        self.path, self.name = self._file.path, self._file.name
        architecture = self._file.settings.get("general.architecture")
        if architecture not in _FAMILIES:
            known = ", ".join(sorted(_FAMILIES))
            raise InputError(f"GGUF files of architecture {architecture!r} are not supported; supported are {known}.")
        self._spec = _FAMILIES[architecture]
        assert self._spec.gguf is not None
        self._theirs = self._spec.gguf
        experts = any("_exps." in name or ".ffn_gate_inp." in name for name in self._file.entries)
        if experts or number_of(self._file.settings, f"{architecture}.expert_count", 0, path) > 0:
            raise InputError(
                f"The model in {path} is a mixture of experts, which is not read from GGUF; prune the Hugging Face folder."
            )
        check_sizes(self._file.settings, [entry.shape for entry in self._file.entries.values()], path)
        self._names = {self._hugging_face_name(name): name for name in self._file.entries if name != ROPE_FREQS}
        try:
            with self._file.parsed_once(), _alone(self.path) as (folder, name):
                self.config = AutoConfig.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
                self._tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
        except Exception as error:  # transformers raises many types of errors when the file lacks something
            raise InputError(f"The configuration or tokenizer in {path} cannot be used: {first_line(error)}") from error
        for leftover in ("_model_name_or_path", "unk_token_id"):
            if hasattr(self.config, leftover):
                delattr(self.config, leftover)
        self._settle(architecture)
        self.config.tie_word_embeddings = "lm_head.weight" not in self._names
        self._scale_rope(architecture)
        if why := self._theirs.why_not(self.config):
            raise InputError(f"transformers reads {path} as another model than llama.cpp does: {why}.")

    def _settle(self, architecture: str) -> None:
        """Give the configuration what llama.cpp reads from the file, or decides by itself, and transformers does not."""
        if architecture == "llama":
            if hasattr(self.config, "sliding_window"):  # transformers reads a model named Mistral as one
                self.config.sliding_window = None  # llama.cpp computes it without windows
            return
        heads = self.config.hidden_size // self.config.num_attention_heads
        self.config.head_dim = int(number_of(self._file.settings, f"{architecture}.attention.key_length", heads, self.path))
        for name in self._theirs.settings(self.config):
            if (theirs := f"{architecture}.{name}") in self._file.settings:
                value = number_of(self._file.settings, theirs, 0, self.path)
                setattr(self.config, name.rpartition(".")[2], value)
        for name, value in self._theirs.decided(self.config).items():
            setattr(self.config, name, value)

    def _scale_rope(self, architecture: str) -> None:
        """Add the scaling of the rotary embedding to the configuration where transformers leaves it out."""
        # transformers uses its own default base if the file gives none.
        given = getattr(self.config, "rope_parameters", None) or vars(self.config)
        of_all = given.get("full_attention", given)  # Gemma 3's windows have another one, which is not scaled
        default = float(of_all["rope_theta"])
        theta = number_of(self._file.settings, f"{architecture}.rope.freq_base", default, self.path)
        rule = rope_rule(self._file, architecture, theta, head_dim_of(self.config))
        if rule["rope_type"] == "default":
            return
        scaled = {"rope_theta": theta, **rule}
        if knows_rope_parameters():
            self.config.rope_parameters = scaled if of_all is given else {**given, "full_attention": scaled}
        else:
            self.config.rope_scaling = rule

    def _hugging_face_name(self, name: str) -> str:
        """Return the Hugging Face name of a GGUF tensor; an unknown one keeps its name, and is rejected later."""
        parts = name.split(".")
        if parts[0] == "blk" and len(parts) == 4:
            return f"{self._spec.layers}.{parts[1]}.{self._theirs.layer.get(parts[2], parts[2])}.{parts[3]}"
        if parts[0] in self._theirs.model and len(parts) == 2:
            return f"{self._theirs.model[parts[0]]}.{parts[1]}"
        return name

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._file.entries[theirs].shape for name, theirs in self._names.items()}

    def storage_dtype(self, name: str) -> torch.dtype:
        entries = [entry for entry in self._file.entries.values() if len(entry.shape) > 1]
        kinds = {_FLOAT_TYPES.get(entry.kind, torch.bfloat16) for entry in entries}
        # GGUF stores norms in fp32 whatever the dtype of the weights, but a model has one dtype.
        return kinds.pop() if len(kinds) == 1 else torch.bfloat16

    def dtype_in_memory(self) -> torch.dtype:
        return torch.float32

    def _read(self, names: list[str]) -> dict[str, torch.Tensor]:
        return {name: self._read_tensor(name) for name in names}

    def _read_tensor(self, name: str) -> torch.Tensor:
        tensor = self._file.read(self._names[name])
        if self._theirs.one_added and tensor.ndim == 1:
            return tensor - 1
        if not self._theirs.adjacent_pairs:
            return tensor
        if name.endswith(f"{self._spec.q_proj}.weight"):
            return _undo_rope_order(tensor, self.config.num_attention_heads)
        if name.endswith(f"{self._spec.k_proj}.weight"):
            return _undo_rope_order(tensor, self.config.num_key_value_heads)
        return tensor

    def tokenizer(self, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
        return self._tokenizer

    def write_companions(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(folder)
        settle_tokenizer_class(folder)


@contextmanager
def _alone(path: Path) -> Iterator[tuple[str, str]]:
    """Yield a temporary folder that contains only a link to a file, and the link's name.

    Otherwise transformers would also read files beside it, such as the tokenizer_config.json of another model.
    """
    with tempfile.TemporaryDirectory(prefix="slimllm-") as folder:
        (Path(folder) / "model.gguf").symlink_to(path.resolve())
        yield folder, "model.gguf"


def rope_order(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder the rows of q or k, or of their bias, as llama.cpp stores them; the inverse of `_undo_rope_order`."""
    pairs = tensor.view(num_heads, 2, tensor.shape[0] // num_heads // 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _undo_rope_order(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder the rows of q or k from llama.cpp's order, rotary pairs side by side, to Hugging Face's, half by half."""
    pairs = weight.view(num_heads, weight.shape[0] // num_heads // 2, 2, -1)
    return pairs.transpose(1, 2).reshape(weight.shape)
