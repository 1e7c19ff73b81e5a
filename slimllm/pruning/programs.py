"""Settings with which a result loads in the program that it is for (`PruneConfig.program`), from the model's configuration.

transformers and vLLM read layers of equal sizes, with the biases and numbers of heads of the family's own architecture; or,
if the model computes as LLaMA does, of `seed_oss`. llama.cpp reads such models with any sizes, and others in equal sizes.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from slimllm.checkpoints.source import ModelSource
from slimllm.config import PruneConfig
from slimllm.errors import InputError
from slimllm.methods.allocation.uniform import Uniform
from slimllm.methods.recovery.lstsq import LeastSquares
from slimllm.models.families import Biases, Family, family_of
from slimllm.models.llama_cpp import gguf_names
from slimllm.models.slicing import LayerSizes
from slimllm.presets import PRESETS

_log = logging.getLogger("slimllm")
_NAMES = {"transformers": "transformers", "vllm": "vLLM", "llama.cpp": "llama.cpp"}


@dataclass(frozen=True)
class _Place:
    """What a program reads of a family.

    Attributes:
        any_sizes: Whether layers may have different sizes.
        bias: Whether it has a place for the biases that recoveries add.
        bias_if_asked: The same, if an architecture that is slower there may be used.
    """

    any_sizes: bool
    bias: bool
    bias_if_asked: bool


def fit_programs(configs: list[PruneConfig], source: ModelSource) -> list[PruneConfig]:
    """Return the settings of one model's runs as `fit_program` does, and log what was changed."""
    fitted = [fit_program(config, source.config, source.sizes()) for config in configs]
    for note in dict.fromkeys(note for _, notes in fitted for note in notes):
        _log.info(note)
    return [config for config, _ in fitted]


def fit_program(config: PruneConfig, model: PretrainedConfig, sizes: list[LayerSizes]) -> tuple[PruneConfig, list[str]]:
    """Return the settings that follow from `config.program`, with `bias` decided, and what was changed, in sentences.

    Args:
        config: The settings.
        model: The configuration of the model to prune.
        sizes: Sizes of its layers.

    Raises:
        ValueError: (as InputError) the program cannot read such a result, or not with these settings.
    """
    if config.program is None:
        return dataclasses.replace(config, bias="no" if config.bias == "no" else "yes"), []
    spec, name = family_of(model.model_type), _NAMES[config.program]
    place = _place(config.program, spec, model, sizes)
    changes: dict[str, Any] = {}
    notes = []
    if not place.any_sizes and not config.allocation.alike:
        _check_preset(config, "allocation", f"{name} reads {spec.name} with the same size in all layers; give uniform")
        changes["allocation"] = Uniform()
        notes.append(f"all layers lose the same, since {name} reads {spec.name} with the same size in all layers")
    if config.bias == "yes" and not place.bias_if_asked:
        raise InputError(f"bias is yes, but {name} has no place for a bias in {spec.name}; leave it out, or give no.")
    bias = config.bias if config.bias != "auto" else "yes" if place.bias else "no"
    changes["bias"] = bias
    if bias == "no" and config.bias == "auto" and config.recovery.adds_bias:
        if not config.recovery.goes_without_bias:
            _check_preset(config, "recovery", f"{name} has no place for its biases in {spec.name}; give lstsq")
            changes["recovery"] = LeastSquares()
            notes.append(f"the recovery is lstsq without biases, since {name} has no place for them in {spec.name}")
        else:
            notes.append(f"no biases are added, since {name} has no place for them in {spec.name}")
    if keeps_all_heads(config, spec, model, sizes):
        notes.append(f"no heads are removed, since {name} reads {spec.name} with all of them only")
    return dataclasses.replace(config, **changes), [f"For {name}: {note}." for note in notes]


def allowed_units(config: PruneConfig, spec: Family, model: PretrainedConfig, size: LayerSizes) -> tuple[int, ...] | None:
    """Return the numbers of units that a layer may lose so that the program reads the rest; None: any.

    They are multiples of the layer's step of units.
    """
    if config.program == "llama.cpp":
        # Its LLaMA has biases of q, k and v in the full width only.
        return (0,) if size.qkv_bias and spec.fits_llama(model) else None
    if spec.fits_llama(model):
        return None  # seed_oss takes any number
    units, groups = size.units(config.head_unit)
    numbers = range(0, units // groups, size.unit_step(config.head_unit, config.heads_multiple_of))
    return tuple(
        number
        for number in numbers
        if number == 0 or spec.takes_heads(model, size.without(number, 0, config.head_unit, False).num_heads)
    )


def keeps_all_heads(config: PruneConfig, spec: Family, model: PretrainedConfig, sizes: list[LayerSizes]) -> bool:
    """Return whether the program reads the model with all of its heads only, although there are several to remove."""
    several = any(size.units(config.head_unit)[0] > size.units(config.head_unit)[1] for size in sizes)
    return several and all(allowed_units(config, spec, model, size) == (0,) for size in sizes)


def _place(program: str, spec: Family, model: PretrainedConfig, sizes: list[LayerSizes]) -> _Place:
    as_llama = spec.fits_llama(model)
    if program == "llama.cpp":
        gguf_names(spec, model)  # raises if there are none
        if any(size.qkv_bias or size.attention_out_bias for size in sizes) and not as_llama:
            raise InputError(f"llama.cpp has no place for the biases of this {spec.name} model; leave out the program.")
        return _Place(any_sizes=as_llama, bias=as_llama, bias_if_asked=as_llama)
    if spec.slopes:
        raise InputError(
            f"{_NAMES[program]} computes the slopes of {spec.name}'s position bias from the number of heads, and would "
            "change those of the kept heads; leave out the program: only the native format, with its own code, keeps them."
        )
    new = Biases(qkv=any(size.qkv_bias for size in sizes), out=True, gate=any(size.gate_bias for size in sizes), down=True)
    own = spec.stock_holds(new)
    return _Place(any_sizes=False, bias=own or (as_llama and program == "transformers"), bias_if_asked=own or as_llama)


def _check_preset(config: PruneConfig, kind: str, otherwise: str) -> None:
    """Raise InputError unless a method is the preset's own, which may be replaced."""
    method = getattr(config, kind)
    if config.preset == "paper":
        raise InputError(f"The preset paper has the {kind} {method.name}, but {otherwise} with another preset.")
    if method.name != PRESETS[config.preset][kind]:
        raise InputError(f"The {kind} is {method.name}, but {otherwise}, or leave out the {kind}.")
