"""Memory estimate of a run: the memory of its phases, counted from the sizes alone.

A phase is a moment of the run with all memory that is in use, part by part, in bytes. The peak is the largest phase.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from slimllm.config import PruneConfig
from slimllm.methods.allocation.sensitivity import MOST_STATES, TOKENS
from slimllm.methods.moments import PART
from slimllm.methods.recovery.lstsq import OUTPUTS, ROWS
from slimllm.methods.statistics import Needs
from slimllm.models.families import family_of
from slimllm.models.slicing import LayerSizes
from slimllm.ops.heads import CONTRIBUTIONS, cheaper_method
from slimllm.pruning.shapes import dense_windows, may_stream_heads, tokens_to_fit
from slimllm.runtime.hidden_states import Placement
from slimllm.runtime.mapped import WAITING
from slimllm.statistics import TILE

Parts = dict[str, float]
_TOKENS_PER_BATCH = 1024


@dataclass(frozen=True)
class Sizes:
    """Sizes on which the memory of a run depends.

    Attributes:
        hidden_size, vocab_size: D and V.
        attention_width, kv_width: Inputs of o_proj and outputs of k_proj, the largest of any layer.
        num_heads, num_kv_heads: The largest of any layer.
        intermediate_size: I, the largest of any layer.
        layer_params, params: Parameters of the largest layer and of the whole model.
        stored, computed, written: Bytes of a number as it is read, computed with, and written.
        samples, seq_len: Number of calibration windows, and tokens in each.
        held_out: Number of held-out windows, to which nothing is fitted.
        ranks: Processes that share the windows; the estimate is for one of them.
        on_gpu: Whether the device has its own memory.
        biased_heads: Heads whose scores get a bias for all pairs of tokens, the most of any layer.
        experts, experts_per_token: Experts of an FFN, each I wide, and those that a token is routed to; 1: it is dense.
        fit_tokens: See `tokens_to_fit`.
    """

    hidden_size: int
    vocab_size: int
    attention_width: int
    kv_width: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    layer_params: int
    params: int
    stored: int
    computed: int
    written: int
    samples: int
    seq_len: int
    held_out: int
    on_gpu: bool
    ranks: int = 1
    biased_heads: int = 0
    experts: int = 1
    experts_per_token: int = 1
    fit_tokens: int = 0


def sizes_of(
    config: PretrainedConfig,
    layers: list[LayerSizes],
    head_dim: int,
    params: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    windows: tuple[int, int, int],
    device: torch.device,
    ranks: int = 1,
) -> Sizes:
    """Collect the sizes of a model, its dtypes (read, computed, written) and its windows (samples, seq_len, held out)."""
    return Sizes(
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        attention_width=max(size.num_heads for size in layers) * head_dim,
        kv_width=max(size.num_kv_heads for size in layers) * head_dim,
        num_heads=max(size.num_heads for size in layers),
        num_kv_heads=max(size.num_kv_heads for size in layers),
        intermediate_size=max(size.intermediate_size for size in layers),
        layer_params=max(size.params for size in layers),
        params=params,
        stored=dtypes[0].itemsize,
        computed=dtypes[1].itemsize,
        written=dtypes[2].itemsize,
        samples=windows[0],
        seq_len=windows[1],
        held_out=windows[2],
        on_gpu=device.type == "cuda",
        ranks=ranks,
        biased_heads=max(size.num_heads for size in layers) if family_of(config.model_type).slopes else 0,
        experts=max(size.experts for size in layers),
        fit_tokens=tokens_to_fit(layers, config),
        experts_per_token=getattr(config, "num_experts_per_tok", 1) if family_of(config.model_type).expert else 1,
    )


def batch_windows(samples: int, seq_len: int, batch_size: int | None) -> int:
    """Return how many windows pass a layer together: as many as asked for, or about 1024 tokens' worth."""
    return min(samples, batch_size or max(1, _TOKENS_PER_BATCH // seq_len))


@dataclass(frozen=True)
class Phase:
    """Memory in use at a moment of the run, in bytes, on the GPU and on the host."""

    name: str
    gpu: Parts
    host: Parts


def phases(sizes: Sizes, config: PruneConfig, placement: Placement) -> Iterator[Phase]:
    """Yield the moments of a run that can be its peak, without the memory of Python and the libraries.

    Args:
        sizes: Sizes of the model and its calibration.
        config: The settings.
        placement: Where token-sized tensors are stored.
    """
    d, i, a, s, c = sizes.hidden_size, sizes.intermediate_size, sizes.attention_width, sizes.stored, sizes.computed
    experts, in_ffn = sizes.experts, sizes.experts_per_token * (4 * i + 4 * d) * c
    kept = math.ceil((1 - config.ratio / 4) * i)  # in the least pruned layer, approximately
    tokens = math.ceil(sizes.samples / sizes.ranks) * sizes.seq_len
    held_out = math.ceil(sizes.held_out / sizes.ranks) * sizes.seq_len
    batch = batch_windows(sizes.samples, sizes.seq_len, config.batch_size) * sizes.seq_len
    by_channels = Needs.COLUMN_GRAM in config.needs or experts > 1
    lstsq, obs = Needs.COLUMN_GRAM in config.recovery.needs, Needs.COLUMN_GRAM in config.criterion.needs
    by_output = Needs.OUTPUT_GRAM in config.criterion.needs
    units = sizes.num_kv_heads if config.head_unit == "kv-group" else sizes.num_heads
    batches = math.ceil(tokens / batch)
    by_heads = may_stream_heads(config) and "stream" in {
        cheaper_method(tokens, d, a, units, fused, batches) for fused in (False, True)
    }
    pinned = 2 * _pinned(d * a * s) + 2 * _pinned(d * sizes.kv_width * s) + 3 * experts * _pinned(d * i * s)
    # Token-sized tensors in the FFN: the residual stream, and the outputs where they are needed.
    streams = 1 if by_channels else 2

    def at(name: str, num_streams: int, device: Mapping[str, float], host: Mapping[str, float] | None = None) -> Phase:
        shared = not sizes.on_gpu and s == c  # the layer computes with the tensors that were read
        device = {"layer, computing": 0 if shared else sizes.layer_params * c, **device}
        stored = 2 * pinned if placement.read_ahead else sizes.layer_params * s
        host = {"layer, as stored": stored, **(host or {})}
        if placement.states == "device":
            device |= {"hidden states": (num_streams * tokens + held_out) * d * c}
        elif placement.states == "host":
            of_batch = batch * d * c
            batches = (num_streams * tokens + held_out) / batch
            host |= {"hidden states": batches * (_pinned(of_batch) if sizes.on_gpu else of_batch)}
        return Phase(name, device, host) if sizes.on_gpu else Phase(name, {}, {**host, **device})

    # The system, whose inverse takes its place, and some of its rows; and the weights, twice. Each of several ranks has the
    # system beside its part of the inverse.
    shared = 1 if sizes.ranks == 1 else 1 + 1 / sizes.ranks
    elimination: Parts = {"elimination": 4 * i**2 * shared + 2 * 4 * i * d / sizes.ranks + 2 * 8 * min(256, i) * i}
    copies = 2 if config.token_weights == "norm" else 1
    tiles = {"tiles of the Gram": (min(i, TILE) + copies * batch) * i * 4}
    if placement.gram == "disk":
        waiting = min(experts * WAITING, tokens * sizes.experts_per_token)  # every Gram has its own
        tiles["batches for the Gram"] = (waiting + batch) * i * c
    # What of a Gram that is not on the device is in host memory: all of it, or what is used at a time of a file.
    gram_on_host: Parts = {"Gram of channels": (2 * min(i, TILE) * i if placement.gram == "disk" else experts * i**2) * 4}

    def inner(width: int) -> Parts:
        num_bytes = tokens * width * c
        kept_in_memory = num_bytes <= placement.keep_inner_bytes and (experts == 1 or width == a)
        return {"inner activations": num_bytes if kept_in_memory else 0}

    cast: Parts = {"tensor to cast": d * i * s if sizes.on_gpu and s != c else 0}  # weights are cast on the device
    yield at("read", 1, cast, {"mapped file": d * i * s})
    scores = 2 * batch * sizes.seq_len * sizes.biased_heads * c  # of one batch
    # Of a batch: attention's inputs, q, k and v, both of the last before and after the rotation, and the fp32 norm.
    in_attention = batch * ((6 * a + 4 * sizes.kv_width + 3 * d) * c + 2 * d * 4) + scores
    yield at("dense pass", 1, {"batch": max(batch * in_ffn, in_attention)})
    if measures_gram(config):
        # The states before and after a layer, and the layer in fp32.
        probes = (
            2 * probe_bytes(sizes) + (0 if c == 4 else sizes.layer_params * 4) if config.allocation.by_sensitivity else 0
        )
        both, one = {"Gram": (a**2 + experts * i**2) * 4, "probes": probes}, {"Gram": a**2 * 4, "probes": probes}
        of_batch = {"batch": batch * in_ffn + scores}
        if placement.gram != "device":
            yield at("measuring", 1, one | of_batch | tiles, gram_on_host)
            here, there = (one, elimination) if placement.solves_on_host else (one | elimination, {})
            yield at("allocation", 1, here, gram_on_host | there)
        else:
            yield at("measuring", 1, both | of_batch)
            yield at("allocation", 1, both | elimination)

    def of_pruning() -> Iterator[Phase]:
        yield at("attention", 1, inner(a) | {"batch": in_attention, "Gram": a**2 * 4})
        if by_heads:  # possibly instead of the Gram: fp64 sums, fp32 sums of a batch, tiles, copies of the weight and x
            sums = units**2 * d * (8 + 4) + 3 * 4 * CONTRIBUTIONS + (0 if c == 4 else a * d * 4) + 2 * batch * a * 4
            yield at("attention by heads", 1, inner(a) | {"batch": in_attention, "heads' covariances": sums})
        heads = inner(a) | {"Gram": a**2 * (4 + 8), "heads' covariances": 2 * units**2 * d * 8}
        if obs:
            heads |= {"elimination": 2 * 4 * a * d + 2 * 8 * min(256, a) * a}  # the system replaces the covariance
        yield at("heads", 1, heads)
        ffn_gram: Parts = (
            {"Gram": experts * i**2 * 4} if by_channels else {"Gram": d**2 * 4 if Needs.OUTPUT_GRAM in config.needs else 0}
        )
        away = by_channels and placement.gram != "device"
        stored: tuple[Parts, Parts] = ({}, gram_on_host) if away else (ffn_gram, {})  # on the device, and on the host

        def solving(name: str, system: Parts, device: Parts | None = None, host: Parts | None = None) -> Phase:
            """Make a phase in which a system is solved beside the FFN's Gram."""
            here, there = ({}, system) if placement.solves_on_host else (system, {})
            return at(name, streams, inner(i) | (device or {}) | stored[0] | here, (host or {}) | stored[1] | there)

        here, there = (tiles, gram_on_host) if away else (ffn_gram, {})
        yield at("FFN", streams, inner(i) | here | {"batch": batch * in_ffn}, there)
        # A covariance in fp64, and either its eigenvectors and LAPACK's workspace (3 of its size in fp64), or as much for
        # the matrices of the function (6 in fp32).
        space = d**2 * (8 + 3 * 8) + (0 if c == 4 else d * i * 4) if by_output else d**2 * 8
        yield at("channels", streams, inner(i) | here | {"feature space": space}, there)
        if obs:
            yield solving("obs", elimination)
        # Changed projections are in fp32 until they are written.
        sliced: Parts = {"pruned layer": 3 * kept * d * s if experts == 1 else experts * kept * d * (2 * s + 4)}
        if lstsq:
            # Of this rank's outputs: the change of all, and of some the covariances with what is lost, the solution twice,
            # and their removed weights; some rows of the covariance.
            own, some = d / sizes.ranks, min(d / sizes.ranks, OUTPUTS)
            moments = 8 * (kept * (own + 3 * some) + (i - kept) * some)
            moments += 12 * max(min(ROWS, kept) * (i - kept), min(256, kept) * kept)
            system: Parts = {"system": 8 * kept**2, "moments": moments}
            solution: Parts = {"solution": 2 * 8 * kept * d}
            # The output's variance is streamed with token weights, else it is that of its covariance.
            covariance: Parts = {} if config.token_weights == "norm" else {"covariance": d**2 * (2 * 8 + 4)}
            yield solving("recovery", system, covariance)
            yield solving("slicing", solution, cast, sliced)
        else:
            if by_channels:
                yield solving("recovery", {"moments": 12 * min(PART, kept) * kept + 8 * d * (i + min(PART, kept))})
            yield at("slicing", streams, inner(i) | cast | {"covariance": d**2 * (4 + 8)}, sliced)

    if config.one_pass:  # only the windows that judge the result pass the pruned layers
        yield at("slicing", 1, {"batch": max(256, sizes.seq_len) * (2 * i + 4 * d) * c}, {"pruned layer": 3 * kept * d * s})
    else:
        yield from of_pruning()
    embedded = 0 if placement.states == "disk" or sizes.on_gpu else (tokens + held_out) * d * c
    # As in `ModelSource.loss_sum`: part of the vocabulary for part of the tokens; the head in the dtype that is read.
    rows, entries = min(batch, max(sizes.seq_len, 2048)), min(sizes.vocab_size, 4096)
    logits: dict[str, float] = {"layer, computing": 0, "logits": rows * (4 * entries + 2 * d) * 4 + entries * d * (c + s)}
    if config.allocation.by_sensitivity:
        logits["probes"] = 2 * probe_bytes(sizes)
    yield at("perplexity", 1, logits, {"layer, as stored": 0, "output head": 2 * sizes.vocab_size * d * s})
    yield Phase("embeddings", {}, {"embeddings": sizes.vocab_size * d * s * 2, "hidden states": embedded})


def measures_gram(config: PruneConfig) -> bool:
    """Return whether the allocation measures the dense model by the Grams of its columns."""
    return config.allocation.needs is not None and Needs.COLUMN_GRAM in config.allocation.needs


def _pinned(num_bytes: int) -> int:
    """Return the bytes that torch allocates for pinned memory: the next power of two."""
    return 1 << max(0, num_bytes - 1).bit_length()


def probe_bytes(sizes: Sizes) -> float:
    """Return the most bytes of the window's states that `auto` carries through the dense model in fp32."""
    return MOST_STATES * min(TOKENS, sizes.seq_len) * sizes.hidden_size * 4


def traffic(sizes: Sizes, config: PruneConfig) -> Parts:
    """Estimate the bytes that pass through the busiest rank, the first one, for a layer over both passes.

    A sum of n bytes over R ranks sends 2·n·(R - 1)/R bytes over each link. Hidden states go to the first rank for the
    journal; its disk may not be ready for those of every layer.
    """
    d, i, a, others = sizes.hidden_size, sizes.intermediate_size, sizes.attention_width, 1 - 1 / sizes.ranks
    lstsq, kept = Needs.COLUMN_GRAM in config.recovery.needs, (1 - config.ratio) * i
    of_ffn = sizes.experts * i**2 if Needs.COLUMN_GRAM in config.needs or sizes.experts > 1 else d**2
    grams = 0 if config.one_pass else 4 * (a**2 + of_ffn)
    grams += 4 * (a**2 + sizes.experts * i**2) if measures_gram(config) else 0
    dense = dense_windows(config, sizes.fit_tokens, sizes.samples, sizes.seq_len)
    windows = dense + (sizes.ranks if config.one_pass else sizes.samples) + 2 * sizes.held_out
    states = windows * sizes.seq_len * d * sizes.computed
    solutions = 8 * (1 - config.ratio) * (a + i) * d if lstsq else 0
    # A factor by panels, and the rows of an inverse that a removal needs.
    solutions += 4 * kept**2 if lstsq else 0
    solutions *= sizes.experts
    removals = 4 * (i**2 / 2 + i * (i - kept)) if Needs.COLUMN_GRAM in config.criterion.needs else 0
    removals += 4 * (i**2 / 2 + i**2 / 2) if measures_gram(config) else 0
    removals *= sizes.experts
    parts = {
        "Grams": 2 * grams * others,
        "hidden states": states * others,
        "solutions": solutions * others,
        "eliminations": 2 * removals * others,
    }
    return {name: size for name, size in parts.items() if size}
