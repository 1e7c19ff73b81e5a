"""Sizes of the layers in the units in which they are pruned, and a check that a model can lose what is asked for."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from slimllm.calibration.windows import SAMPLES
from slimllm.checkpoints.source import ModelSource
from slimllm.config import PruneConfig
from slimllm.errors import InputError
from slimllm.methods.allocation.flap import FlapAllocation
from slimllm.methods.allocation.removal import LayerShape
from slimllm.methods.allocation.target import find_target
from slimllm.methods.statistics import Needs
from slimllm.models.families import Family
from slimllm.models.slicing import LayerSizes
from slimllm.ops.dispatch import choose
from slimllm.ops.heads import cheaper_method
from slimllm.pruning.programs import allowed_units

# transformers multiplies the rows of all experts at once, in kernels that want multiples of 16 bytes: 8 numbers in half
# precision.
EXPERT_STEP = 8
# From two tokens for a column on, its ridge is the weaker one of `has_few_tokens`.
TOKENS_PER_CHANNEL = 2


def layer_shapes(source: ModelSource, config: PruneConfig) -> list[LayerShape]:
    """Return the shape of every layer of a model.

    Raises:
        ValueError: (as InputError) its heads are not a multiple of `config.heads_multiple_of`.
    """
    return [_shape(source, size, config) for size in source.sizes()]


def check_settings(source: ModelSource, config: PruneConfig) -> None:
    """Check before the dense pass that a model can lose as much as the settings ask for.

    Raises:
        ValueError: (as InputError) it cannot.
    """
    check_experts(source.spec, config)
    find_target(layer_shapes(source, config), config)


def check_experts(spec: Family, config: PruneConfig) -> None:
    """Check that the settings suit a mixture of experts, if a family is one.

    Raises:
        ValueError: (as InputError) they do not.
    """
    if not spec.expert:
        return
    what = f"the experts of {spec.name}"
    if config.adds_bias and not config.recovery.goes_without_bias:
        raise InputError(
            f"The recovery {config.recovery.name} adds biases, for which {what} have no place; give lstsq or none. The "
            "preset best has lstsq."
        )
    if config.round_to and config.round_to % EXPERT_STEP:
        raise InputError(
            f"round_to is {config.round_to}, but {what} need widths that are multiples of {EXPERT_STEP}; give such a "
            "number (the preset paper has 1)."
        )
    if config.criterion.dense_statistics:
        raise InputError(
            f"The criterion {config.criterion.name} prunes by statistics of the dense model, which are not collected for "
            f"{what}; give another one, such as obs."
        )
    if isinstance(config.allocation, FlapAllocation):
        raise InputError(
            f"The allocation flap compares the channels of one FFN, not those of {what}; give auto or uniform."
        )


def tokens_to_fit(sizes: list[LayerSizes], model: PretrainedConfig) -> int:
    """Return the least number of tokens with which a fit of the widest FFN has one for every column.

    It is the FFN's width; or an expert's, times the tokens of which it sees one if it sees half as many as the average one.

    Args:
        sizes: Sizes of the layers.
        model: The model's configuration.
    """
    size = max(sizes, key=lambda size: size.intermediate_size)
    if size.experts == 1:
        return size.intermediate_size
    return -(-2 * size.intermediate_size * size.experts // model.num_experts_per_tok)


def may_stream_heads(config: PruneConfig) -> bool:
    """Return whether the settings allow the statistics of heads instead of a Gram, see `streams_heads`."""
    needs_gram = config.criterion.attention_gram or config.recovery.attention_gram
    return not needs_gram and config.preset != "paper" and config.token_weights == "none"


def streams_heads(
    config: PruneConfig, tokens: tuple[int, int], shape: torch.Size, units: int, device: torch.device
) -> bool:
    """Return whether attention's statistics are the covariances of its heads, streamed from the tokens, and not a Gram.

    This is the case if no method uses the Gram and there are so few tokens that it is less work. The preset `paper` always
    uses the Gram, so that its results stay the same to the last bit.

    Args:
        config: The settings.
        tokens: Number of this process's tokens, and of its batches.
        shape: Shape of the output projection's weight, (D, H·d).
        units: H, heads or KV groups.
        device: Where the layer computes.
    """
    if not may_stream_heads(config):
        return False
    fused = choose("head_covariance_of_tokens", device).backend == "triton"
    return cheaper_method(tokens[0], shape[0], shape[1], units, fused, tokens[1]) == "stream"


def samples_for(config: PruneConfig, tokens: int) -> int:
    """Return how many calibration windows the settings ask for, or else what their methods need.

    Args:
        config: The settings.
        tokens: `tokens_to_fit` of the model. Methods that fit a Gram of channels get TOKENS_PER_CHANNEL times as many.
    """
    if config.token_ids is not None:
        return len(config.token_ids)
    if config.samples is not None:
        return config.samples
    needs, of_allocation = config.needs, config.allocation.needs
    fits = Needs.COLUMN_GRAM in (needs if of_allocation is None else needs | of_allocation)
    return max(SAMPLES, -(-TOKENS_PER_CHANNEL * tokens // config.seq_len)) if fits else SAMPLES


def dense_windows(config: PruneConfig, tokens: int, samples: int, seq_len: int) -> int:
    """Return how many of the calibration windows the methods of a run need in the dense pass.

    Args:
        config: The settings.
        tokens: `tokens_to_fit` of the model; a Gram is measured on at least as many.
        samples, seq_len: Number and length of the calibration windows.
    """
    if config.one_pass:
        return samples
    needs, enough = config.allocation.needs, config.allocation.dense_windows(samples)
    if needs is not None and Needs.COLUMN_GRAM in needs:
        enough = max(enough, -(-tokens // seq_len))
    return min(samples, enough)


def _shape(source: ModelSource, size: LayerSizes, config: PruneConfig) -> LayerShape:
    hidden_size: int = source.config.hidden_size
    query_params = source.head_dim * (2 * hidden_size + size.qkv_bias)  # rows of q_proj and columns of o_proj
    kv_params = 2 * source.head_dim * (hidden_size + size.qkv_bias)
    units, groups = size.units(config.head_unit)
    by_group = size.by_group(config.head_unit)
    new_bias = hidden_size if config.adds_bias else 0
    return LayerShape(
        units=units // groups,
        unit_params=size.group_size * query_params + kv_params if by_group else groups * query_params,
        channels=size.intermediate_size,
        channel_params=size.experts * (hidden_size + (1 + size.gated) * (hidden_size + size.gate_bias)),
        params=size.params,
        attention_bias_params=0 if size.attention_out_bias else new_bias,
        ffn_bias_params=0 if size.ffn_out_bias or size.experts > 1 else new_bias,
        grouped=size.group_size > 1,
        unit_step=size.unit_step(config.head_unit, config.heads_multiple_of),
        channel_step=EXPERT_STEP if size.experts > 1 else 1,
        allowed=allowed_units(config, source.config, size, source.container),
    )
