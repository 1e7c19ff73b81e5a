"""How fast models generate, dense and pruned in turn. Called by `slimllm latency` and users.

Every model is in a process of its own, so that its memory can be seen; they take turns, so that whatever else the machine
does meets all alike. What is timed is `generate` of transformers, greedy, from random prompts: what a user of it gets.
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

from slimllm.config import DTYPES, check_choice, parse_device
from slimllm.errors import InputError
from slimllm.evaluation.latency.worker import Shape, serve
from slimllm.evaluation.perplexity import locate
from slimllm.pruning.report import versions


@dataclass(frozen=True)
class Timed:
    """One model at one shape.

    Attributes:
        model: As it was given.
        shape: What was generated.
        first_token_s: Seconds to the first token of every round: the prompt's pass.
        next_tokens_s: Seconds for all other tokens of every round.
        parameters: Number in the whole model; embeddings that are also the head count once.
        prefill_macs, decode_macs: Multiply-adds for a token of the prompt, whose last one alone passes the head, and for
            a new token after it.
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
        """Tokens of all prompts a second, by round."""
        return [self.shape.batch_size * self.shape.prompt / seconds for seconds in self.first_token_s]

    @property
    def decode_rates(self) -> list[float]:
        """New tokens of all prompts a second, by round, without the first ones."""
        return [self.shape.batch_size * (self.shape.new_tokens - 1) / seconds for seconds in self.next_tokens_s]


@dataclass(frozen=True)
class Latency:
    """What was measured: a line for each shape and model, and each model's memory.

    Attributes:
        lines: For every shape those of all models, in the order in which they were given.
        memory_gib: The most that each took to generate, with its weights: of a GPU what torch had allocated, of the host
            what came on top of Python and the libraries.
        dtype, device, threads: What computed.
    """

    lines: list[Timed]
    memory_gib: list[float]
    dtype: str
    device: str
    threads: int

    def speedup(self, line: Timed, rates: str) -> float:
        """Speed-up of a line over the first model at the same shape.

        The median over the rounds of the ratio of `prefill_rates` or `decode_rates`, which were taken one after the other.
        """
        first = next(other for other in self.lines if other.shape == line.shape)
        return statistics.median(own / dense for own, dense in zip(getattr(line, rates), getattr(first, rates)))

    def write(self, path: Path) -> None:
        """Everything, and the medians, as a new JSON file."""
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

    The models' processes are started anew, as `multiprocessing` does by "spawn": a script that calls this from its top
    level needs `if __name__ == "__main__":` around the call.

    Args:
        models: Folders, GGUF files or hub ids; the first is what the others are compared with. All are in memory at once.
        batch_sizes: Prompts at once.
        prompts: Tokens of a prompt.
        new_tokens: Tokens that are generated for each, 2 at least.
        rounds: Figures are medians over them; one more comes before them and does not count.
        dtype, device, trust_remote_code: As for `load`.
        progress: Called with the number of measurements done, of how many, and what comes next.

    Raises:
        ValueError: (as InputError) a setting is out of range, a model cannot be loaded or takes fewer tokens, or memory ran
            out.
    """
    check_shapes(batch_sizes, prompts, new_tokens, rounds)
    if not models:
        raise InputError("Give at least one model.")
    if dtype is not None:
        check_choice("dtype", dtype, tuple(DTYPES))
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
    """Raise ValueError (as InputError) where there is nothing to be timed."""
    settings = {"batch_sizes": batch_sizes, "prompts": prompts, "new_tokens": [new_tokens], "rounds": [rounds]}
    for name, values in settings.items():
        least = 2 if name == "new_tokens" else 1
        if not values or min(values) < least:
            raise InputError(f"{name} must be at least {least}, got {', '.join(map(str, values)) or 'none'}.")


class _Worker:
    """A model in a process of its own."""

    def __init__(self, model: str, dtype: str | None, device: str, trust_remote_code: bool) -> None:
        self.model = model
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, model, dtype, device, trust_remote_code)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def end(self) -> None:
        """By itself, as nobody asks any more; by force if it is at work."""
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
            reason = "killed, probably because memory ran out; take fewer models or tokens"
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
