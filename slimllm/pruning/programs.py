"""Settings with which a result loads in the program that it is for (`PruneConfig.program`), from the model's configuration.

transformers and vLLM read layers of equal sizes, with the biases and numbers of heads of the family's own architecture; or,
if the model computes as LLaMA does, of `seed_oss`. llama.cpp reads such models with any sizes, and others in equal sizes.
A vision-language model has the class of its language model as transformers has it, so its results are always such ones.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from slimllm.checkpoints.output_format import biases_of
from slimllm.checkpoints.source import ModelSource
from slimllm.config import PruneConfig
from slimllm.errors import InputError
from slimllm.methods.allocation.uniform import Uniform
from slimllm.methods.recovery.lstsq import LeastSquares
from slimllm.models.families import Biases, Container, Family, family_of, head_dim_of
from slimllm.models.llama_cpp import gguf_names
from slimllm.models.slicing import LayerSizes

_log = logging.getLogger("slimllm")
_NAMES = {"transformers": "transformers", "vllm": "vLLM", "llama.cpp": "llama.cpp"}


@dataclass(frozen=True)
class _Reader:
    """What has to read a result, and what it reads of the model's family.

    Attributes:
        name: Name of the program, or of the larger model that contains the pruned one.
        family: Name of the family.
        any_sizes: Whether layers may have different sizes.
        bias: Whether it has a place for the biases that recoveries add.
        bias_if_asked: The same, if an architecture that is slower there may be used.
        takes_heads: Conditions for the number of query heads.
    """

    name: str
    family: str
    any_sizes: bool
    bias: bool
    bias_if_asked: bool
    takes_heads: list[Callable[[int], bool]]


def fit_programs(configs: list[PruneConfig], source: ModelSource) -> list[PruneConfig]:
    """Return the settings of one model's runs as `fit_program` does, and log what was changed."""
    fitted = [fit_program(config, source.config, source.sizes(), source.container) for config in configs]
    for note in dict.fromkeys(note for _, notes in fitted for note in notes):
        _log.info(note)
    return [config for config, _ in fitted]


def fit_program(
    config: PruneConfig, model: PretrainedConfig, sizes: list[LayerSizes], container: Container | None
) -> tuple[PruneConfig, list[str]]:
    """Return the settings that follow from `config.program`, with `bias` decided, and what was changed, in sentences.

    Args:
        config: The settings.
        model: The configuration of the model to prune.
        sizes: Sizes of its layers.
        container: The larger model that contains it, if there is one.

    Raises:
        ValueError: (as InputError) the program cannot read such a result, or not with these settings.
    """
    reader = _reader(config.program, model, sizes, container)
    if reader is None:
        return dataclasses.replace(config, bias="no" if config.bias == "no" else "yes"), []
    name, family = reader.name, reader.family
    if not reader.any_sizes and len({(size.num_heads, size.num_kv_heads, size.intermediate_size) for size in sizes}) > 1:
        raise InputError(
            f"{name} reads {family} with the same size in all layers, but the layers of this model differ; prune the model "
            "that it was made from, with this program, or export it --to padded first."
        )
    changes: dict[str, Any] = {}
    notes = []
    if not reader.any_sizes and not config.allocation.alike:
        _check_preset(config, "allocation", f"{name} reads {family} with the same size in all layers; give uniform")
        changes["allocation"] = Uniform()
        notes.append(f"all layers lose the same, since {name} reads {family} with the same size in all layers")
    if config.bias == "yes" and not reader.bias_if_asked:
        raise InputError(f"bias is yes, but {name} has no place for a bias in {family}; leave it out, or give no.")
    bias = config.bias if config.bias != "auto" else "yes" if reader.bias else "no"
    changes["bias"] = bias
    if bias == "no" and config.bias == "auto" and config.recovery.adds_bias:
        if not config.recovery.goes_without_bias:
            _check_preset(config, "recovery", f"{name} has no place for its biases in {family}; give lstsq")
            changes["recovery"] = LeastSquares()
            notes.append(f"the recovery is lstsq without biases, since {name} has no place for them in {family}")
        else:
            notes.append(f"no biases are added, since {name} has no place for them in {family}")
    if config.bias == "yes" and not reader.bias:
        notes.append(f"the biases make it seed_oss instead of {family}, which {name} runs through its Transformers backend")
    config = dataclasses.replace(config, **changes)
    if _several(config, sizes) and all(allowed_units(config, model, size, container) == (0,) for size in sizes):
        notes.append(f"no heads are removed, since {name} reads {family} with all of them only")
    return config, [f"For {name}: {note}." for note in notes]


def allowed_units(
    config: PruneConfig, model: PretrainedConfig, size: LayerSizes, container: Container | None
) -> tuple[int, ...] | None:
    """Return the numbers of units that a layer may lose so that the program reads the rest; None: any.

    They are multiples of the layer's step of units.
    """
    reader = _reader(config.program, model, [size], container)
    if reader is None or not reader.takes_heads:
        return None
    units, groups = size.units(config.head_unit)
    numbers = range(0, units // groups, size.unit_step(config.head_unit, config.heads_multiple_of))
    heads = {number: size.without(number, 0, config.head_unit, False).num_heads for number in numbers}
    return tuple(number for number in numbers if not number or all(takes(heads[number]) for takes in reader.takes_heads))


def _several(config: PruneConfig, sizes: list[LayerSizes]) -> bool:
    """Return whether there are units to remove in any layer."""
    return any(units > groups for units, groups in (size.units(config.head_unit) for size in sizes))


def _reader(
    program: str | None, model: PretrainedConfig, sizes: list[LayerSizes], container: Container | None
) -> _Reader | None:
    """Return what has to read a result; None: anything that runs its code."""
    if program is None and container is None:
        return None
    spec = family_of(model.model_type)
    as_llama = spec.fits_llama(model) and not (container and container.one_class)
    name = _NAMES[program] if program else f"transformers' {container and container.model_type}"
    takes_heads: list[Callable[[int], bool]] = []
    if container:
        takes_heads.append(lambda number: container.takes_heads(model, number))
    of_llama_cpp = program != "llama.cpp" or _by_llama_cpp(spec, model, sizes)
    if program == "llama.cpp" and spec.fits_llama(model) and any(size.qkv_bias for size in sizes):
        takes_heads.append(lambda number: bool(number == model.num_attention_heads))  # biases in the full width only
    if program == "llama.cpp" and container is None:
        return _Reader(name, spec.name, as_llama, of_llama_cpp, of_llama_cpp, takes_heads)
    if spec.slopes:
        raise InputError(
            f"{name} computes the slopes of {spec.name}'s position bias from the number of heads, and would change those "
            "of the kept heads; leave out --for (in Python, program): only the native format, with its code, keeps them."
        )
    if not as_llama:  # seed_oss takes any number
        takes_heads.append(lambda number: spec.takes_heads(model, number))
    if program == "vllm":
        takes_heads.append(lambda number: spec.vllm_takes_heads(model, number))
    new = Biases(qkv=any(size.qkv_bias for size in sizes), out=True, gate=any(size.gate_bias for size in sizes), down=True)
    own, there = spec.stock_holds(new), biases_of(sizes)
    if not (as_llama or spec.stock_holds(there)):
        raise InputError(
            f"The model has biases that {name} has no place for in {spec.name}; prune the model that it was made from, "
            "with this program."
        )
    bias = of_llama_cpp and (own or (as_llama and program != "vllm"))
    return _Reader(name, spec.name, False, bias, of_llama_cpp and (own or as_llama), takes_heads)


def _by_llama_cpp(spec: Family, model: PretrainedConfig, sizes: list[LayerSizes]) -> bool:
    """Return whether llama.cpp has a place for new biases.

    Raises:
        ValueError: (as InputError) it does not read the model.
    """
    gguf_names(spec, model)
    biased = any(size.qkv_bias for size in sizes)
    if spec.fits_llama(model):
        if biased and model.num_attention_heads * head_dim_of(model) != model.hidden_size:
            raise InputError(
                "llama.cpp has no place for the biases of q, k and v where the heads are not as wide as the hidden size; "
                "leave out --for (in Python, program)."
            )
        return True
    if biased or any(size.attention_out_bias or size.ffn_out_bias or size.gate_bias for size in sizes):
        raise InputError(
            f"llama.cpp has no place for the biases of this {spec.name} model; leave out --for (in Python, program)."
        )
    return False


def _check_preset(config: PruneConfig, kind: str, otherwise: str) -> None:
    """Raise InputError unless a method is the preset's own, which may be replaced."""
    method = getattr(config, kind)
    if config.preset == "paper":
        raise InputError(f"The preset paper has the {kind} {method.name}, but {otherwise} with another preset.")
    if method != getattr(PruneConfig(config.ratio, config.preset), kind):
        raise InputError(f"The {kind} is {method.name}, but {otherwise}, or leave out the {kind}.")
