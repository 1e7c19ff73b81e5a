"""Descriptions of model families, and of models that are read as another family.

A decoder layer is two residual sub-layers, `h += f post_norm(project(inner(norm(h))))`; most families have no post-norm,
and f is 1.
`inner` is the attention or the FFN without its output projection. Statistics are collected from the output of `inner`.
docs/extending/families.md describes how to add a family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # families are known without transformers, which takes seconds to import
    from transformers import PretrainedConfig

Rows = slice | torch.Tensor
FAMILIES: dict[str, Family] = {}  # by `model_type` of config.json
READ_AS: dict[str, ReadAs] = {}
CONTAINERS: dict[str, Container] = {}


@dataclass(frozen=True)
class Biases:
    """Whether the projections of a model have a bias: q, k and v; o; gate and up; down."""

    qkv: bool
    out: bool
    gate: bool
    down: bool


def _nothing_against(config: PretrainedConfig) -> str | None:
    return None


def _no_settings(config: PretrainedConfig) -> dict[str, Any]:
    return {}


# Of models with the names of LLaMA.
GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GGUF_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
GGUF_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True)
class GGUFNames:
    """GGUF's name of an architecture and of its modules, and how llama.cpp reads them.

    Attributes:
        architecture: Its name.
        layer: The family's names of the modules of a layer, by GGUF's names, which follow `blk.N.`.
        model: The same for the modules outside the layers.
        adjacent_pairs: Whether the rotary embedding turns pairs of adjacent rows, for which those of q and k are reordered.
        one_added: Whether the norms' gains are stored with the 1 that the family adds to its weights.
        settings: Returns further settings of a model, whose names follow the architecture's.
        why_not: Returns why llama.cpp would compute something else; None: it computes the same.
        decided: Returns, for a configuration that was read from a file, the settings that llama.cpp decides by itself.
    """

    architecture: str
    layer: dict[str, str]
    model: dict[str, str]
    adjacent_pairs: bool = False
    one_added: bool = False
    settings: Callable[[PretrainedConfig], dict[str, Any]] = _no_settings
    why_not: Callable[[PretrainedConfig], str | None] = _nothing_against
    decided: Callable[[PretrainedConfig], dict[str, Any]] = _no_settings


def _any_number(config: PretrainedConfig, num_heads: int) -> bool:
    return True


def divides_hidden_size(config: PretrainedConfig, num_heads: int) -> bool:
    """Return whether a number of heads divides hidden_size, which some architectures require."""
    return bool(config.hidden_size % num_heads == 0)


def _with_all_of_attention(biases: Biases) -> bool:
    return biases.qkv == biases.out and not (biases.gate or biases.down)


def without_biases(biases: Biases) -> bool:
    """Return whether there are no biases at all, which is what the classes of Mistral's families hold."""
    return not (biases.qkv or biases.out or biases.gate or biases.down)


def _never(config: PretrainedConfig) -> bool:
    return False


def one_expert(config: PretrainedConfig) -> str | None:
    """Return a sentence if a mixture has fewer than two experts, else None."""
    if config.num_local_experts < 2:
        return f"The model has mixtures of {config.num_local_experts} experts; there have to be at least two."
    return None


def head_dim_of(config: PretrainedConfig) -> int:
    """Return the size of an attention head; it is computed for older configurations, which do not store it."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def has_windows(config: PretrainedConfig) -> bool:
    """Return whether some layers attend to a sliding window of tokens only."""
    if isinstance(types := getattr(config, "layer_types", None), list):
        return any(kind != "full_attention" for kind in types)
    return getattr(config, "sliding_window", None) is not None


def without_windows(config: PretrainedConfig) -> dict[str, Any]:
    """Return the settings of a model of Qwen's without sliding windows."""
    layers = ["full_attention"] * config.num_hidden_layers
    return {"use_sliding_window": False, "sliding_window": None, "layer_types": layers}


@dataclass(frozen=True)
class Family:
    """Description of a model family: the names inside its models, and its peculiarities.

    Module names up to `head` are full paths; from `attention` on they are relative to the decoder layer.

    Attributes:
        name: The family's `model_type`; that of its native format has the prefix `slim_`.
        attention_post_norm, ffn_post_norm: The norm applied to a sub-layer's output before it is added to the residual
            stream; empty: there is none.
        update_factor: An attribute of the decoder layer, a number by which what a sub-layer adds to the residual stream is
            multiplied; empty: there is none.
        before_layers: A further module before the first layer, such as a learned position embedding or a norm; empty:
            there is none.
        rotary: The rotary embedding; empty: there is none.
        slopes: A tensor with one number for each head; empty: there is none.
        ffn: The module of the FFN; empty: its parts belong to the layer itself, with `activation` between up and down.
        expert: One of the experts of an FFN that is a mixture of them, with `{}` for its number, to which the names of the
            FFN's projections are then relative; empty: the FFN is dense. See `by_expert`.
        gate_proj: The gate of the FFN; empty: there is none.
        width: Name of the FFN's width in config.json.
        also: Other values of `model_type` whose models belong to this family unchanged.
        why_not: Returns why the model of a configuration cannot be pruned; None: it can.
        takes_heads: Whether the family's own architecture accepts a number of query heads with a configuration.
        vllm_takes_heads: The same for vLLM's class of the family, if it knows it.
        stock_holds: Whether transformers' class of the family has exactly these biases; by default q, k, v and o all or
            none, and none in the FFN. Biases that the class has and a layer lacks are written as zeros.
        fits_llama: Whether a model computes exactly what LLaMA's classes compute, apart from biases and sizes, so that it
            can be written as `seed_oss` or as GGUF's `llama`. Models with multipliers, caps or windows do not.
        gguf: How llama.cpp reads the family's own architecture, in which models that do not fit LLaMA are written; None:
            not at all, or slimllm does not know it.
    """

    name: str = "llama"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    before_layers: str = ""
    final_norm: str = "model.norm"
    rotary: str = "model.rotary_emb"
    head: str = "lm_head"
    attention: str = "self_attn"
    attention_norm: str = "input_layernorm"
    attention_post_norm: str = ""
    q_proj: str = "self_attn.q_proj"
    k_proj: str = "self_attn.k_proj"
    v_proj: str = "self_attn.v_proj"
    o_proj: str = "self_attn.o_proj"
    slopes: str = ""
    update_factor: str = ""
    ffn: str = "mlp"
    ffn_norm: str = "post_attention_layernorm"
    ffn_post_norm: str = ""
    expert: str = ""
    gate_proj: str = "mlp.gate_proj"
    up_proj: str = "mlp.up_proj"
    down_proj: str = "mlp.down_proj"
    activation: str = ""
    width: str = "intermediate_size"
    also: tuple[str, ...] = ()
    why_not: Callable[[PretrainedConfig], str | None] = _nothing_against
    takes_heads: Callable[[PretrainedConfig, int], bool] = _any_number
    vllm_takes_heads: Callable[[PretrainedConfig, int], bool] = _any_number
    stock_holds: Callable[[Biases], bool] = _with_all_of_attention
    fits_llama: Callable[[PretrainedConfig], bool] = _never
    gguf: GGUFNames | None = None

    @property
    def attention_projections(self) -> tuple[str, ...]:
        """The linear layers of the attention."""
        return self.q_proj, self.k_proj, self.v_proj, self.o_proj

    @property
    def ffn_projections(self) -> tuple[str, ...]:
        """The linear layers of a dense FFN, or of one expert."""
        return (*self.into_ffn, self.down_proj)

    @property
    def into_ffn(self) -> tuple[str, ...]:
        """The linear layers whose outputs are the FFN's channels."""
        return (self.gate_proj, self.up_proj) if self.gate_proj else (self.up_proj,)

    def of_expert(self, number: int) -> Family:
        """Return the description with one expert as the layer's dense FFN."""
        expert = self.expert.format(number)
        gate = f"{expert}.{self.gate_proj}" if self.gate_proj else ""
        up, down = f"{expert}.{self.up_proj}", f"{expert}.{self.down_proj}"
        return replace(self, ffn=expert, expert="", gate_proj=gate, up_proj=up, down_proj=down)

    def by_expert(self, tensors: Iterable[str]) -> list[Family]:
        """Return the descriptions of the layer's dense FFNs: of its only one, or of every expert.

        Args:
            tensors: Names of the layer's tensors, by which the experts are counted.
        """
        if not self.expert:
            return [self]
        experts: list[Family] = []
        tensors = set(tensors)
        while f"{(one := self.of_expert(len(experts))).down_proj}.weight" in tensors:
            experts.append(one)
        return experts


@dataclass(frozen=True)
class ReadAs:
    """Models whose checkpoints are read as those of another family that computes the same.

    Attributes:
        model_type: `model_type` in their config.json.
        family: `model_type` of the family that they are read as.
        config: Converts their configuration to that family's, or raises ValueError (as InputError).
        rows: Returns, for the converted configuration, the parts of every fused projection in a layer and the rows of each
            part, by name.
        added: Returns, for the converted configuration, the tensors of every layer that the checkpoint does not store, by
            their names in the layer.
    """

    model_type: str
    family: str
    config: Callable[[PretrainedConfig], PretrainedConfig]
    rows: Callable[[PretrainedConfig], dict[str, dict[str, Rows]]]
    added: Callable[[PretrainedConfig], dict[str, torch.Tensor]] = field(default=lambda config: {})


@dataclass(frozen=True)
class Container:
    """Models that contain a language model of a family, and other parts, which pruning leaves as they are.

    Attributes:
        model_type: `model_type` in their config.json.
        language_model: Converts the language model's configuration to that of a family, or raises ValueError (as
            InputError).
        takes_heads: Whether their language model accepts a number of query heads, in addition to its family's condition.
        one_class: Whether their language model is always of the same class, so that no other architecture can replace it.
    """

    model_type: str
    language_model: Callable[[PretrainedConfig], PretrainedConfig]
    takes_heads: Callable[[PretrainedConfig, int], bool] = _any_number
    one_class: bool = False


def register_family(family: Family) -> Family:
    """Register a family under its own name, that of its native format, and those in `also`."""
    for name in (family.name, f"slim_{family.name}", *family.also):
        FAMILIES[name] = family
    return family


def register_reading(reading: ReadAs) -> None:
    """Register models that are read as another family's."""
    READ_AS[reading.model_type] = reading


def register_container(container: Container) -> None:
    """Register models that contain a language model."""
    CONTAINERS[container.model_type] = container
