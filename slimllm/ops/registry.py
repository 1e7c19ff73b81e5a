"""Registry of the operations, with all that dispatch, the self-check and `slimllm doctor` know about each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

Random = Callable[..., torch.Tensor]  # shape → standard normal fp32 numbers on the device under test
Cases = Callable[[Random, int], list[torch.Tensor]]

_LIBRARY = torch.library.Library("slimllm", "DEF")
_forced: ContextVar[str | None] = ContextVar("forced", default=None)


@dataclass(frozen=True)
class Operation:
    """Description of one operation.

    Attributes:
        name: Name in `torch.ops.slimllm`.
        kernel: Whether it has a Triton kernel.
        extension: Inputs that the compiled extension supports, in words, by device type.
        only_torch: Why it has neither a kernel nor the extension.
        cases: Runs the operation on small inputs; its results must agree across backends. Its arguments are a function
            that makes random inputs, and a number of tokens that a GPU splits over programs.
    """

    name: str
    kernel: bool = False
    extension: dict[str, str] = field(default_factory=dict)
    only_torch: str = ""
    cases: Cases | None = None


OPERATIONS: dict[str, Operation] = {}


def register(operation: Operation) -> None:
    """Register an operation.

    Raises:
        ValueError: the name is already registered.
    """
    if operation.name in OPERATIONS:
        raise ValueError(f"an operation named {operation.name} is already registered; choose another name.")
    OPERATIONS[operation.name] = operation


def operator(
    schema: str,
    shape: Callable[..., Any],
    cases: Cases | None = None,
    *,
    kernel: bool = False,
    extension: dict[str, str] | None = None,
    only_torch: str = "",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that registers a function as torch.ops.slimllm.NAME, for all devices; it defines no gradients.

    torch.compile sees the function as one node, and `torch.library.opcheck` can test it. It runs without autograd and
    autocast, whatever the caller has enabled, so that all backends give the same result: no graph keeps every batch in
    memory, and half precision is used only on request. `torch.library.custom_op` would cost 0.1 ms a call on a slow core,
    ten times as much.

    Args:
        schema: Schema in torch's syntax, `name(Tensor a, …) -> Tensor`.
        shape: Function of the same arguments that returns an empty result of the right shape and dtype.
        cases, kernel, extension, only_torch: See `Operation`.
    """
    name = schema.split("(")[0]
    register(Operation(name, kernel, extension or {}, only_torch, cases))

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
    """Make all operations use one backend, whatever the settings."""
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """Return the backend set by `forced`, or None."""
    return _forced.get()


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without autocast on the device."""
    on = torch.amp.autocast_mode.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()
