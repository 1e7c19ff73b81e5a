"""The operations: each is registered once, with all that dispatch, the self-check and `slimllm doctor` know of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

Random = Callable[..., torch.Tensor]  # of a shape: standard normal fp32 numbers on the device that is checked
Cases = Callable[[Random, int], list[torch.Tensor]]

_LIBRARY = torch.library.Library("slimllm", "DEF")
_forced: ContextVar[str | None] = ContextVar("forced", default=None)


@dataclass(frozen=True)
class Operation:
    """What is known of one operation.

    Attributes:
        name: As in `torch.ops.slimllm`.
        kernel: Whether there is a Triton kernel of it.
        extension: For what the compiled extension has it, in words, by type of device.
        only_torch: Why it has neither.
        cases: Runs it on small inputs, random ones of any shape, with so many tokens where a GPU would split them over
            programs; what it returns must be alike on all backends.
    """

    name: str
    kernel: bool = False
    extension: dict[str, str] = field(default_factory=dict)
    only_torch: str = ""
    cases: Cases | None = None


OPERATIONS: dict[str, Operation] = {}


def register(operation: Operation) -> None:
    """Make an operation known.

    Raises:
        ValueError: there is one of this name.
    """
    if operation.name in OPERATIONS:
        raise ValueError(f"there is an operation {operation.name} already.")
    OPERATIONS[operation.name] = operation


def operator(
    schema: str, shape: Callable[..., Any], cases: Cases, *, kernel: bool = False, extension: dict[str, str] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function becomes torch.ops.slimllm.NAME, for all devices; no gradients are defined.

    torch.compile then sees it as one node, and `torch.library.opcheck` can test it. It runs without autograd and autocast,
    whatever the caller has on, so that all backends give the same: no graph that would keep every batch alive, and no half
    precision that was not asked for. `torch.library.custom_op` would cost 0.1 ms a call on a slow core, ten times as much.

    Args:
        schema: As torch writes it, `name(Tensor a, …) -> Tensor`.
        shape: A function of the same arguments that returns an empty result of the right shape and dtype.
        cases, kernel, extension: See `Operation`.
    """
    name = schema.split("(")[0]
    register(Operation(name, kernel, extension or {}, cases=cases))

    def define(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(first: torch.Tensor, *others: Any) -> Any:
            with torch.no_grad(), without_autocast(first.device):
                return function(first, *others)

        _LIBRARY.define(schema)
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"slimllm::{name}", shape, lib=_LIBRARY)
        return getattr(torch.ops.slimllm, name).default

    return define


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """Let all operations use one backend, whatever else has been asked for."""
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """The backend that `forced` has set; None: none."""
    return _forced.get()


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """No automatic half precision on the device."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()
