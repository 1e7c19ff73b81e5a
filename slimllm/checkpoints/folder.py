"""Settings and weight files of a model's folder, or an error that says what the folder contains instead.

Nothing in a folder is executed unless the user trusts its code, and nothing is unpickled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

import slimllm.models.registration  # noqa: F401  (so that pruned checkpoints are known to the Auto classes)
from slimllm.checkpoints.foreign_json import MOST_OF_SETTINGS, read_object
from slimllm.errors import InputError, first_line
from slimllm.models.families import CONTAINERS, family_of
from slimllm.models.modeling.slim_layers import knows_rope_parameters, rope_of_transformers_4

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_QUANTISED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
# Settings of transformers 4 and 5 that can also name kernels on the hub.
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_FILE_NAME = re.compile(r"[^/\0]{1,200}")
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
# Upper limits of the sizes in config.json, beyond any model.
_MOST = {
    **dict.fromkeys(LAYERS, 2_000),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "num_key_value_heads"), 100_000),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "intermediate_size", "ffn_dim", "n_inner", "head_dim"),
        10_000_000,
    ),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions"), 1_000_000_000),
}


def read_settings(path: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """Read config.json unchanged.

    Raises:
        ValueError: (as InputError) the folder has no config.json or is not a model, the file is not a JSON object, or it
            asks for weights in another file or for code that is not part of transformers.
    """
    file = path / "config.json"
    if (path / "adapter_config.json").is_file():
        raise InputError(
            f"{path} is an adapter of peft, not a model; merge it into its model (merge_and_unload, then save_pretrained) "
            "and give that folder."
        )
    if not file.is_file():
        raise InputError(f"{path} holds no config.json{_instead(path)}; give the folder of a Hugging Face model.")
    settings = read_object(file, MOST_OF_SETTINGS)
    _check_counts(settings, file)
    if not trust_remote_code and (code := _hub_code(settings)):
        raise InputError(f"{file} asks for code from the hub ({code}), which is not run; remove that entry.")
    if weights := settings.get("transformers_weights"):
        raise InputError(
            f"{file} asks for weights in {weights!r}, which is not read; rename that file to {SINGLE} and remove the entry."
        )
    return settings


def _check_counts(settings: dict[str, Any], file: Path) -> None:
    """Raise ValueError (as InputError) if a size in config.json is not a valid size, or is larger than any model's.

    Libraries trust these numbers, and create as many layers or entries before anything else is checked.
    """
    for name, value in settings.items():
        if isinstance(value, dict):
            _check_counts(value, file)
        most, least = _MOST.get(name), 0 if isinstance(value, list) else 1
        for number in value if isinstance(value, list) else [value]:  # some models give one per layer
            if most is None or number is None:
                continue
            if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= most:
                raise InputError(
                    f"{name} in {file} is {str(number)[:40]!r}, but should be a whole number from {least} to {most:,}."
                )


def _hub_code(settings: dict[str, Any]) -> str | None:
    """Return an entry, at any depth, that makes transformers fetch kernels from the hub and run them; None if none does."""
    for name, value in settings.items():
        if _IMPLEMENTATION.fullmatch(name) and "/" in str(value):
            return f"{name} is {value!r}"
        if isinstance(value, dict) and (found := _hub_code(value)):
            return found
    return None


def quantisation_of(settings: dict[str, Any]) -> str | None:
    """Return the quantisation method that config.json names; None if the weights are not quantised."""
    parts = [settings, *(part for part in settings.values() if isinstance(part, dict))]
    for part in parts:
        for name in ("quantization_config", "compression_config"):
            if found := part.get(name):
                return str(found.get("quant_method") or "quantised") if isinstance(found, dict) else "quantised"
    return None


def read_config(path: Path) -> PretrainedConfig:
    """Read the configuration of a model that can be pruned.

    Raises:
        ValueError: (as InputError) as `read_settings`, or the model is not an unquantised causal language model of a
            supported family.
    """
    settings = read_settings(path)
    if kind := quantisation_of(settings) or next(
        ("quantised" for name in _QUANTISED_FILES if (path / name).is_file()), None
    ):
        raise InputError(f"{path} holds {kind} weights; prune the unquantised model and quantise the result.")
    if "model_type" not in settings:
        raise InputError(f"{path / 'config.json'} has no model_type; give the folder of a Hugging Face model.")
    if (contained := settings["model_type"] in CONTAINERS) is False:
        family_of(str(settings["model_type"]))
    architectures = settings.get("architectures") or []
    architectures = architectures if isinstance(architectures, list) else [architectures]
    ending = "ForConditionalGeneration" if contained else "ForCausalLM"
    if architectures and not any(str(name).endswith(ending) for name in architectures):
        kind = "model that generates text from images" if contained else "causal language model"
        raise InputError(f"{path} is not a {kind}, but {', '.join(map(str, architectures))}.")
    for name in ("dtype", "torch_dtype"):
        if not isinstance(settings.get(name), str | None):
            raise InputError(f"{name} in {path / 'config.json'} is {str(settings[name])[:40]!r}; it should be a name.")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers checks the settings, and raises many types of errors
        raise InputError(f"The configuration in {path} cannot be used: {first_line(error)}") from error
    check_padding(config, path)
    return _with_known_rope(config)


def check_padding(config: PretrainedConfig, path: Path) -> None:
    """Raise ValueError (as InputError) if the padding token is not in the vocabulary, which torch would reject."""
    padding, entries = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    if isinstance(padding, int) and isinstance(entries, int) and padding >= entries:
        raise InputError(
            f"pad_token_id in {path / 'config.json'} is {padding}, but the vocabulary has the tokens 0 to {entries - 1}; "
            "transformers cannot load the model either; set it to null or to one of these."
        )


def _with_known_rope(config: PretrainedConfig) -> PretrainedConfig:
    """Under transformers 4, convert the rotary settings that version 5 writes; version 4 would silently ignore them."""
    if not knows_rope_parameters() and getattr(config, "rope_parameters", None):
        for name, value in rope_of_transformers_4(config.rope_parameters).items():
            setattr(config, name, value)
        del config.rope_parameters
    return config


def weight_files(path: Path) -> list[Path]:
    """Return the weight files that transformers would read: model.safetensors, or else the shards in the index.

    Raises:
        ValueError: (as InputError) there are none, or one is missing; the message says what the folder contains.
    """
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    index = path / INDEX
    if not index.is_file():
        raise InputError(f"{path} holds no weights ({SINGLE}, or shards with {INDEX}){_instead(path)}.")
    content = read_object(index)
    weight_map = content.get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or any(not isinstance(name, str) or not _FILE_NAME.fullmatch(name) for name in names):
        raise InputError(f"{index} is not an index of shards: its weight_map has to name files beside it.")
    shards = [path / name for name in sorted(set(names))]
    for shard in shards:
        if not shard.is_file():
            raise InputError(f"Shard {shard.name}, which {index} names, is missing.")
    return shards


def _instead(path: Path) -> str:
    """Return the end of a sentence: what a folder without weights or configuration contains instead."""

    def first(*patterns: str) -> str | None:
        found = (file.name for pattern in patterns for file in sorted(path.glob(pattern)))
        return next((name for name in found if name != SINGLE), None)

    if name := first("consolidated*.safetensors", "consolidated*.pth", "params.json"):
        return f", but {name}: it is in the format of the model's authors, which has to be converted to Hugging Face's"
    if name := first("model-*-of-*.safetensors"):
        return f", but {name}: its shards have lost their index; save the model again, or fetch {INDEX}"
    if name := first("*.safetensors"):
        return f", but {name}, which transformers does not read by itself; if it is the model, rename it to {SINGLE}"
    if name := first("*.gguf", "*.GGUF"):
        return f", but {name}: give that file"
    if name := first("*.bin", "*.pt", "*.pth", "*.ckpt"):
        return f", but {name}: pickled files are never read; convert them to safetensors"
    if path.parent.name == "snapshots":
        return "; nothing is fetched from a hub repository that has only pickled files"
    return ""


def name_some(names: Iterable[str], one: str, several: str) -> str:
    """Begin a sentence about tensors: name the first, count the others, and add the verb, `one` or `several`."""
    first, *others = names
    return f"Tensors {first} and {len(others)} more {several}" if others else f"Tensor {first} {one}"
