"""Registration with torch.library: torch.compile sees an operation as one node, `torch.library.opcheck` can test it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from slimllm.ops.dispatch import without_autocast

_LIBRARY = torch.library.Library("slimllm", "DEF")


def operator(schema: str, shape: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function becomes torch.ops.slimllm.NAME, for all devices; no gradients are defined.

    It runs without autograd and autocast, whatever the caller has on, so that all backends give the same: no graph that
    would keep every batch alive, and no half precision that was not asked for. `torch.library.custom_op` would cost
    0.1 ms a call on a slow core, ten times as much as this.

    Args:
        schema: As torch writes it, `name(Tensor a, …) -> Tensor`.
        shape: A function of the same arguments that returns an empty result of the right shape and dtype.
    """
    name = schema.split("(")[0]

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(first: torch.Tensor, *others: Any) -> Any:
            with torch.no_grad(), without_autocast(first.device):
                return function(first, *others)

        _LIBRARY.define(schema)
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"slimllm::{name}", shape, lib=_LIBRARY)
        return getattr(torch.ops.slimllm, name).default

    return register
