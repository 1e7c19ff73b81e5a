"""Measurement of generation speed, dense and pruned models in turns. Called by `slimllm latency` and users.

Every model has a process of its own, so that its memory can be measured. The models take turns, so that other load on the
machine affects all of them alike. The measurement times `generate` of transformers, greedy, on random prompts.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import signal
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimllm.checks import DTYPES, check_choice, parse_device
from slimllm.errors import InputError
from slimllm.evaluation.latency.worker import Shape, serve
from slimllm.evaluation.perplexity import locate
from slimllm.pruning.report import versions


@dataclass(frozen=True)
class Timed:
    """Results of one model at one shape.

    Attributes:
        model: The model, as given by the user.
        shape: Prompts and new tokens.
        first_token_s: Seconds to the first token (the pass of the prompt), by round.
        next_tokens_s: Seconds for all other tokens, by round.
        parameters: Number of parameters of the whole model; embeddings shared with the head count once.
        prefill_macs: Multiply-adds for a token of the prompt, of which only the last token passes the head.
        decode_macs: Multiply-adds for a new token.
    """

    model: str
    shape: Shape
    first_token_s: list[float]
    next_tokens_s: list[float]
    parameters: int
    prefill_macs: float
    decode_macs: float

    @property
    def prefill_rates(self) -> list[float]:
        """Tokens per second over all prompts, by round."""
        return [self.shape.batch_size * self.shape.prompt / seconds for seconds in self.first_token_s]

    @property
    def decode_rates(self) -> list[float]:
        """New tokens per second over all prompts, without the first token of each, by round."""
        return [self.shape.batch_size * (self.shape.new_tokens - 1) / seconds for seconds in self.next_tokens_s]


@dataclass(frozen=True)
class Latency:
    """Results: a line for each shape and model, and each model's memory.

    Attributes:
        lines: For every shape, the lines of all models in the order in which these were given.
        memory_gib: Peak memory of each model during generation, with its weights: on a GPU what torch had allocated, on the
            host what was used in addition to Python and the libraries.
        dtype, device, threads: Dtype, device and number of CPU threads of the computation.
    """

    lines: list[Timed]
    memory_gib: list[float]
    dtype: str
    device: str
    threads: int

    def speedup(self, line: Timed, rates: str) -> float:
        """Return the speed-up of a line over the first model at the same shape.

        It is the median over the rounds of the ratio of `rates` (`prefill_rates` or `decode_rates`), which were measured
        one after the other in each round.
        """
        first = next(other for other in self.lines if other.shape == line.shape)
        return statistics.median(own / dense for own, dense in zip(getattr(line, rates), getattr(first, rates)))

    def write(self, path: Path) -> None:
        """Write all results, and their medians, to a new JSON file."""
        content = dataclasses.asdict(self) | {"versions": versions()}
        for row, line in zip(content["lines"], self.lines):
            for name in ("prefill", "decode"):
                row[f"{name}_per_s"] = statistics.median(getattr(line, f"{name}_rates"))
                row[f"{name}_speedup"] = self.speedup(line, f"{name}_rates")
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1) + "\n")


def measure_latency(
    models: Sequence[str | Path],
    *,
    batch_sizes: Sequence[int] = (1,),
    prompts: Sequence[int] = (128,),
    new_tokens: int = 32,
    rounds: int = 5,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Latency:
    """Time prefill and decoding of models, one after the other, round by round.

    The models' processes are started with the "spawn" method of `multiprocessing`, so a script that calls this function at
    its top level must put the call inside `if __name__ == "__main__":`.

    Args:
        models: Folders, GGUF files or hub ids; the others are compared with the first. All are in memory at once.
        batch_sizes: Numbers of prompts in a batch.
        prompts: Prompt lengths in tokens.
        new_tokens: Tokens generated for each prompt, at least 2.
        rounds: Number of rounds whose medians are reported, after one warm-up round.
        dtype, device, trust_remote_code: As for `load`.
        progress: Called with the number of measurements done, their total number, and a description of the next one.

    Raises:
        ValueError: (as InputError) a setting is out of range, a model cannot be loaded or accepts fewer tokens, or memory
            ran out.
    """
    check_shapes(batch_sizes, prompts, new_tokens, rounds)
    if not models:
        raise InputError("Give at least one model.")
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
    where = str(parse_device(device))
    for model in models:
        locate(model, code=trust_remote_code, only=("config.json",))
    shapes = list(dict.fromkeys(Shape(batch, prompt, new_tokens) for batch in batch_sizes for prompt in prompts))
    lines, total, done = [], len(shapes) * (rounds + 1) * len(models), 0
    with _workers(models, dtype, where, trust_remote_code) as workers:
        about = [worker.ask(None) for worker in workers]
        for shape in shapes:
            for worker in workers:
                worker.ask(("check", shape))
            rows: list[list[dict[str, Any]]] = [[] for _ in workers]
            for _ in range(rounds + 1):
                for worker, row in zip(workers, rows):
                    if progress:
                        progress(done, total, f"{Path(worker.model).name}, {shape.batch_size} × {shape.prompt}")
                    row.append(worker.ask(("time", shape)))
                    done += 1
            for worker, row, known in zip(workers, rows, about):
                counted = worker.ask(("count", shape))
                first, rest = ([one[name] for one in row[1:]] for name in ("first_token_s", "next_tokens_s"))
                lines.append(Timed(worker.model, shape, first, rest, known["parameters"], **counted))
        if progress:
            progress(total, total, "")
        peaks = [worker.ask(("memory", None)) for worker in workers]
    return Latency(lines, peaks, about[0]["dtype"], where, about[0]["threads"])


def check_shapes(batch_sizes: Sequence[int], prompts: Sequence[int], new_tokens: int, rounds: int) -> None:
    """Raise ValueError (as InputError) if a setting is missing or too small."""
    settings = {"batch_sizes": batch_sizes, "prompts": prompts, "new_tokens": [new_tokens], "rounds": [rounds]}
    for name, values in settings.items():
        least = 2 if name == "new_tokens" else 1
        if not values or min(values) < least:
            raise InputError(f"{name} must be at least {least}, got {', '.join(map(str, values)) or 'none'}.")


class _Worker:
    """Handle of a process that holds one model."""

    def __init__(self, model: str, dtype: str | None, device: str, trust_remote_code: bool) -> None:
        self.model = model
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, model, dtype, device, trust_remote_code)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def end(self) -> None:
        """Close the connection, at which an idle process exits by itself; terminate one that is busy."""
        self._connection.close()
        self.process.join(2)
        self.process.terminate()
        self.process.join()

    def ask(self, question: Any) -> Any:
        try:
            if question is not None:
                self._connection.send(question)
            kind, answer = self._connection.recv()
        except (EOFError, OSError):
            self.process.join(10)
            code = self.process.exitcode
            reason = "killed, probably because memory ran out; use fewer models or tokens"
            if code != -signal.SIGKILL:
                reason = f"ended (exit code {code}); a script that calls this needs if __name__ == '__main__'"
            raise InputError(f"The process with {self.model} was {reason}.") from None
        if kind == "refused":
            raise InputError(answer)
        return answer


@contextmanager
def _workers(models: Sequence[str | Path], dtype: str | None, device: str, trust: bool) -> Iterator[list[_Worker]]:
    workers: list[_Worker] = []
    try:
        for model in models:
            workers.append(_Worker(str(model), dtype, device, trust))
        yield workers
    finally:
        for worker in workers:
            worker.end()
