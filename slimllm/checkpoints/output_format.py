"""Output format of a pruned model: an architecture of transformers if all layers are alike, else the native format."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from slimllm.checkpoints.base import Checkpoint
from slimllm.errors import InputError
from slimllm.models.families import Biases, Family, family_of, head_dim_of
from slimllm.models.meta import expected_tensors, meta_model
from slimllm.models.modeling import slim_layers
from slimllm.models.modeling.slim_layers import rope_of_transformers_4
from slimllm.models.registration import modeling_file, native_classes
from slimllm.models.slicing import LayerSizes, Tensors, install, sizes_by_layer

# Settings that the output format decides; all others are taken from the source.
_DECIDED = {
    "model_type",
    "architectures",
    "auto_map",
    "per_layer_config",
    "allow_global_per_layer_attribute_access",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "head_dim",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "intermediate_size",
    "ffn_dim",
    "attention_bias",
    "mlp_bias",
    "attention_out_bias",
    "mlp_out_bias",
    "residual_dropout",
    "_name_or_path",
}


@dataclass(frozen=True)
class OutputFormat:
    """The configuration to write, and whether projections without a bias need a zero bias."""

    config: PretrainedConfig
    zero_attention_out_bias: bool = False
    zero_ffn_bias: bool = False

    @property
    def name(self) -> str:
        return str(self.config.model_type)

    def complete(self, tensors: Tensors, spec: Family) -> Tensors:
        """Return a layer's tensors with the zero biases that the format needs."""
        wanted = []
        if self.zero_attention_out_bias:
            wanted += [spec.o_proj]
        if self.zero_ffn_bias:
            wanted += [*spec.into_ffn, spec.down_proj]
        zeros = {}
        for projection in wanted:
            weight = tensors[f"{projection}.weight"]
            if f"{projection}.bias" not in tensors:
                zeros[f"{projection}.bias"] = torch.zeros(weight.shape[0], dtype=weight.dtype)
        return {**tensors, **zeros}


def output_format(source: PretrainedConfig, sizes: list[LayerSizes], dtype: torch.dtype) -> OutputFormat:
    """Choose the output format for these layer sizes, and check that it has a place for every tensor.

    If all layers are alike, this is the family's own architecture if that supports all required biases. Otherwise, for
    models that compute the same as LLaMA, it is `seed_oss`: LLaMA with separate switches for the biases. In all other
    cases it is the native format, with sizes by layer.

    Raises:
        ValueError: (as InputError) the architecture has other tensors: the family's description is wrong.
    """
    form = _choose(source, sizes, dtype)
    _check(form, sizes)
    return form


def biases_of(sizes: list[LayerSizes]) -> Biases:
    """Return which projections have a bias in any layer."""
    names = ("qkv_bias", "attention_out_bias", "gate_bias", "ffn_out_bias")
    return Biases(*(any(getattr(size, name) for size in sizes) for name in names))


def _choose(source: PretrainedConfig, sizes: list[LayerSizes], dtype: torch.dtype) -> OutputFormat:
    spec = family_of(source.model_type)
    # Beside the experts' own width, Qwen's configuration has that of a dense FFN.
    decided = _DECIDED - {"intermediate_size"} | {spec.width}
    common = {name: value for name, value in source.to_dict().items() if name not in decided}
    common |= {"head_dim": head_dim_of(source), "dtype": dtype}
    largest: dict[str, Any] = {
        "num_attention_heads": max(size.num_heads for size in sizes),
        "num_key_value_heads": max(size.num_kv_heads for size in sizes),
        spec.width: max(size.intermediate_size for size in sizes),
    }
    biases = biases_of(sizes)
    qkv_bias, out_bias, gate_bias, ffn_bias = biases.qkv, biases.out, biases.gate, biases.down
    switches = {
        name: value for name, value in (("attention_bias", qkv_bias), ("mlp_bias", gate_bias)) if hasattr(source, name)
    }
    alike = all((size.num_heads, size.num_kv_heads, size.intermediate_size) == tuple(largest.values()) for size in sizes)
    if alike and spec.stock_holds(biases) and spec.takes_heads(source, largest["num_attention_heads"]):
        config = AutoConfig.for_model(
            spec.name, **common, **largest, **switches, architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[spec.name]]
        )
        return OutputFormat(config, zero_attention_out_bias=out_bias, zero_ffn_bias=ffn_bias)
    if alike and spec.fits_llama(source):
        for name in ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"):
            common.pop(name, None)
        config = AutoConfig.for_model(
            "seed_oss",
            **common,
            **largest,
            attention_bias=qkv_bias,
            attention_out_bias=out_bias,
            mlp_bias=ffn_bias or gate_bias,
            residual_dropout=0.0,
            architectures=["SeedOssForCausalLM"],
        )
        return OutputFormat(config, zero_attention_out_bias=out_bias, zero_ffn_bias=ffn_bias or gate_bias)
    overrides = {}
    most = {**largest, "attention_out_bias": out_bias, "mlp_out_bias": ffn_bias}
    for index, size in enumerate(sizes):
        own = {
            "num_attention_heads": size.num_heads,
            "num_key_value_heads": size.num_kv_heads,
            spec.width: size.intermediate_size,
            "attention_out_bias": size.attention_out_bias,
            "mlp_out_bias": size.ffn_out_bias,
        }
        different = {name: value for name, value in own.items() if value != most[name]}
        if different:
            overrides[str(index)] = different
    native, _, causal = native_classes(spec.name)
    return OutputFormat(native(**common, **most, **switches, per_layer_config=overrides, architectures=[causal.__name__]))


def _check(form: OutputFormat, sizes: list[LayerSizes]) -> None:
    """Raise if the model that the configuration describes has other sizes or biases than those that will be written."""
    spec = family_of(form.config.model_type)
    shapes = expected_tensors(meta_model(form.config), spec)
    places = sizes_by_layer(shapes, spec, head_dim_of(form.config), len(sizes))
    for index, (size, place) in enumerate(zip(sizes, places)):
        wanted = dataclasses.replace(
            size,
            params=place.params,
            attention_out_bias=size.attention_out_bias or form.zero_attention_out_bias,
            gate_bias=size.gate_bias or form.zero_ffn_bias,
            ffn_out_bias=size.ffn_out_bias or form.zero_ffn_bias,
        )
        if wanted != place:
            fields = (field.name for field in dataclasses.fields(place))
            names = [name for name in fields if getattr(wanted, name) != getattr(place, name)]
            raise InputError(
                f"The architecture {form.name} has another {' and '.join(names)} in layer {index} than the pruned model, "
                f"so that a tensor would be lost or missing; the description of {spec.name} in slimllm/models/families is "
                "wrong (stock_holds, takes_heads or the native format)."
            )


def convert_in_place(model: PreTrainedModel, output: OutputFormat, spec: Family) -> None:
    """Give a pruned model in memory the classes and the configuration of its output format."""
    device, dtype = model.device, model.dtype
    for layer in model.get_submodule(spec.layers):
        tensors = output.complete({name: tensor.detach() for name, tensor in layer.state_dict().items()}, spec)
        install(layer, spec, tensors, set(tensors), device, dtype)
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(output.config, dtype=dtype)
    attention, name = model.config._attn_implementation, model.config.name_or_path
    for module, like in zip(model.modules(), twin.modules(), strict=True):
        module.__class__ = like.__class__
        for attribute, value in vars(like).items():
            vars(module).setdefault(attribute, value)  # attributes of the new class alone
        if hasattr(module, "config"):
            module.config = output.config
    output.config._attn_implementation = attention
    output.config.name_or_path = name


def write_config(config: PretrainedConfig, folder: Path, checkpoint: Checkpoint) -> None:
    """Write config.json, which transformers 4 can also read, and the modeling files if the format needs them.

    Args:
        config: The configuration of the result.
        folder: The result's folder.
        checkpoint: The model that was pruned, which adds the settings of a larger model around it.
    """
    settings = json.loads(config.to_json_string())
    native = config.model_type.startswith("slim_")
    if "num_local_experts" in settings:
        settings["num_experts"] = settings["num_local_experts"]  # version 4 of transformers knows Qwen's by this name
    if settings.get("rope_parameters") and not native:
        settings |= rope_of_transformers_4(settings["rope_parameters"])  # version 5 prefers rope_parameters
    text = json.dumps(checkpoint.around(settings), indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    if native:
        for module in (modeling_file(family_of(config.model_type).name), slim_layers):
            source = Path(str(module.__file__))
            shutil.copyfile(source, folder / source.name)
