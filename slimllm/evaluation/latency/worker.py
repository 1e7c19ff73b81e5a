"""Worker process that holds one model, and times generation and counts operations on request."""

from __future__ import annotations

import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from slimllm.calibration import longest_input
from slimllm.errors import InputError, exhausted, first_line
from slimllm.evaluation.perplexity import load
from slimllm.runtime import memory
from slimllm.runtime.cores import share_cores
from slimllm.runtime.interrupts import leave_interrupts_to_parent


@dataclass(frozen=True)
class Shape:
    """Size of a generation: prompts in a batch, tokens of each prompt, and new tokens for each."""

    batch_size: int
    prompt: int
    new_tokens: int


@share_cores()
def serve(connection: Connection, name: str, dtype: str | None, device: str, trust_remote_code: bool) -> None:
    """Load the model, and answer requests until the connection is closed."""
    leave_interrupts_to_parent()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        where = torch.device(device)
        memory.warm_up(where)
        runtime = memory.resident_gib()
        model, _ = load(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        memory.release()
        memory.reset_peak(where)  # loading may take more memory than generation, depending on the format of the files
        model.generation_config = GenerationConfig()  # not the model's own, so that every token is generated, greedily
        parameters = sum(parameter.numel() for parameter in model.parameters())
        used = str(next(model.parameters()).dtype).removeprefix("torch.")
        connection.send(("done", {"parameters": parameters, "dtype": used, "threads": torch.get_num_threads()}))
        while True:
            kind, shape = connection.recv()
            answer: Any = None
            if kind == "check":
                check_length(model.config, name, shape)
            elif kind == "time":
                answer = _timed(model, shape)
            elif kind == "count":
                answer = _counted(model, shape)
            else:
                gpu = memory.peak_gpu_gib(where)
                answer = gpu or memory.peak_host_gib() - runtime
            connection.send(("done", answer))
    except InputError as error:
        connection.send(("refused", str(error)))
    except EOFError:
        pass
    except Exception as error:  # raised by the model's own code, or by torch
        if exhausted(error):
            connection.send(("refused", f"The memory of {device} is not enough for {name}; use fewer models or tokens."))
            return
        connection.send(("refused", f"{name} cannot be timed: {type(error).__name__}: {first_line(error)}"))


def check_length(config: PretrainedConfig, name: str, shape: Shape) -> None:
    """Raise ValueError (as InputError) if a shape has more tokens than the model accepts."""
    if shape.prompt + shape.new_tokens > (longest := longest_input(config)):
        raise InputError(
            f"A prompt of {shape.prompt} tokens and {shape.new_tokens} new ones are more than {name} takes, which is "
            f"{longest}; give fewer (--prompt, --new-tokens)."
        )


def _prompts(model: PreTrainedModel, shape: Shape) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (shape.batch_size, shape.prompt), generator=generator)
    return ids.to(model.device)


class _Clock(BaseStreamer):
    """Streamer that records the time of every token; `generate` copies it to the host, so a GPU has finished it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _timed(model: PreTrainedModel, shape: Shape) -> dict[str, float]:
    ids, clock = _prompts(model, shape), _Clock()
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    _generate(model, ids, shape.new_tokens, clock)
    started, *tokens = clock.times  # the prompt comes first
    if len(tokens) != shape.new_tokens:
        raise InputError(f"{len(tokens)} tokens were generated instead of {shape.new_tokens}; the model stopped by itself.")
    return {"first_token_s": tokens[0] - started, "next_tokens_s": tokens[-1] - tokens[0]}


def _generate(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, streamer: BaseStreamer | None = None) -> None:
    generate: Any = model.generate
    generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        streamer=streamer,
    )


def _counted(model: PreTrainedModel, shape: Shape) -> dict[str, float]:
    """Count multiply-adds per token in two runs: the pass of the prompt alone, and with one more token."""
    ids = _prompts(model, shape)[:1]
    by_tokens = []
    implementation = getattr(model.config, "_experts_implementation", None)
    if implementation:  # the counter does not see products of several experts at once
        model.set_experts_implementation("eager")
    for new_tokens in (1, 2):
        with FlopCounterMode(display=False, custom_mapping=_ATTENTION_ON_CPU) as counter:
            _generate(model, ids, new_tokens)
        by_tokens.append(counter.get_total_flops() / 2)
    if implementation:
        model.set_experts_implementation(implementation)
    return {"prefill_macs": by_tokens[0] / shape.prompt, "decode_macs": by_tokens[1] - by_tokens[0]}


def _attention_flops(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
    return sdpa_flop_count(query, key, value)


_ATTENTION_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
