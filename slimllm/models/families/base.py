"""What a model family is, and what is read as one.

A decoder layer is two residual sub-layers, `h += post_norm(project(inner(norm(h))))`, most without a post-norm. `inner` is
the attention (or the FFN) with its output projection taken out, and its output is what the statistics are made of.
docs/extending/families.md says how to add one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import PretrainedConfig

Rows = slice | torch.Tensor
FAMILIES: dict[str, Family] = {}  # by `model_type` of config.json
READ_AS: dict[str, ReadAs] = {}


@dataclass(frozen=True)
class Biases:
    """Which projections of a model have a bias: q, k and v; o; gate and up; down."""

    qkv: bool
    out: bool
    gate: bool
    down: bool


@dataclass(frozen=True)
class GGUFNames:
    """GGUF's names of an architecture: of the modules of a layer (after `blk.N.`) and of the others, and ours."""

    architecture: str
    layer: dict[str, str]
    model: dict[str, str]


def _nothing_against(config: PretrainedConfig) -> str | None:
    return None


def _any_number(config: PretrainedConfig, num_heads: int) -> bool:
    return True


def divides_hidden_size(config: PretrainedConfig, num_heads: int) -> bool:
    """Whether a number of heads divides hidden_size, on which some architectures insist."""
    return bool(config.hidden_size % num_heads == 0)


def _with_all_of_attention(biases: Biases) -> bool:
    return biases.qkv == biases.out and not (biases.gate or biases.down)


def _never(config: PretrainedConfig) -> bool:
    return False


def head_dim_of(config: PretrainedConfig) -> int:
    """Size of an attention head; older configurations leave it to be computed."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def has_windows(config: PretrainedConfig) -> bool:
    """Whether some layers see only so many tokens back."""
    if isinstance(types := getattr(config, "layer_types", None), list):
        return any(kind != "full_attention" for kind in types)
    return getattr(config, "sliding_window", None) is not None


@dataclass(frozen=True)
class Family:
    """One family of models: the names inside it, and what is peculiar to it.

    Names are full paths down to `head`, and relative to the decoder layer from `attention` on.

    Attributes:
        name: Its `model_type`; `slim_` before it makes that of the native format.
        attention_post_norm, ffn_post_norm: The norm that a sub-layer's output passes before it is added to the residual
            stream; empty: none.
        before_layers: What else the residual stream needs before the first layer, an embedding of positions that are
            learned or a norm; empty: nothing.
        rotary: The rotary embedding; empty: there is none.
        slopes: A tensor with one number for each head; empty: there is none.
        ffn: The module of the FFN; empty: its parts are the layer's own, with this `activation` between up and down.
        gate_proj: Empty: the FFN has no gate.
        width: What config.json calls the FFN's width.
        also: Other values of `model_type` whose models are of this family as they are.
        why_not: Says of a configuration why its model cannot be pruned; None: it can.
        takes_heads: Whether the family's own architecture takes a number of query heads beside a configuration.
        stock_holds: Whether transformers' class of the family holds just these biases; the default: q, k, v and o all or
            none, and none in the FFN. What it holds of them and the model lacks is written as zeros.
        fits_llama: Whether a model computes exactly what LLaMA's classes compute, up to biases and sizes, so that it may be
            written as `seed_oss` or as GGUF's `llama`. One with multipliers, caps or windows does not.
        gguf: GGUF's names of the modules; None: llama.cpp does not have the family, or slimllm does not know how.
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
    ffn: str = "mlp"
    ffn_norm: str = "post_attention_layernorm"
    ffn_post_norm: str = ""
    gate_proj: str = "mlp.gate_proj"
    up_proj: str = "mlp.up_proj"
    down_proj: str = "mlp.down_proj"
    activation: str = ""
    width: str = "intermediate_size"
    also: tuple[str, ...] = ()
    why_not: Callable[[PretrainedConfig], str | None] = _nothing_against
    takes_heads: Callable[[PretrainedConfig, int], bool] = _any_number
    stock_holds: Callable[[Biases], bool] = _with_all_of_attention
    fits_llama: Callable[[PretrainedConfig], bool] = _never
    gguf: GGUFNames | None = None

    @property
    def projections(self) -> tuple[str, ...]:
        """All linear layers of a decoder layer."""
        attention = self.q_proj, self.k_proj, self.v_proj, self.o_proj
        return (*attention, *self.into_ffn, self.down_proj)

    @property
    def into_ffn(self) -> tuple[str, ...]:
        """The linear layers whose outputs are the FFN's channels."""
        return (self.gate_proj, self.up_proj) if self.gate_proj else (self.up_proj,)


@dataclass(frozen=True)
class ReadAs:
    """Models whose checkpoints are read as those of another family, which compute the same.

    Attributes:
        model_type: The one in their config.json.
        family: `model_type` of what they are read as.
        config: Makes its configuration, or raises ValueError (as InputError).
        rows: By the name of a fused projection in a layer, its parts, and which of its rows each of them has; from that
            configuration.
        added: Tensors of every layer that the checkpoint does not store, by their names in it.
    """

    model_type: str
    family: str
    config: Callable[[PretrainedConfig], PretrainedConfig]
    rows: Callable[[PretrainedConfig], dict[str, dict[str, Rows]]]
    added: Callable[[PretrainedConfig], dict[str, torch.Tensor]] = field(default=lambda config: {})


def register_family(family: Family) -> Family:
    """Make a family known, under its own name, that of its native format, and others."""
    for name in (family.name, f"slim_{family.name}", *family.also):
        FAMILIES[name] = family
    return family


def register_reading(reading: ReadAs) -> None:
    """Make models known that are read as another family's."""
    READ_AS[reading.model_type] = reading
