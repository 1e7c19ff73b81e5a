"""Memory that is pinned where the system allows it, and errors that say which memory is exhausted."""

from __future__ import annotations

import errno
import logging

import pytest
import torch

from slimllm.checkpoints.source import ModelSource
from slimllm.errors import exhausted
from slimllm.runtime.memory import moved, pinned_like


def test_pageable_memory_where_pinning_fails(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    empty = torch.empty

    def refusing(*shape: object, pin_memory: bool = False, **rest: object) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")
        return empty(*shape, **rest)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "empty", refusing)
    with caplog.at_level(logging.WARNING, "slimllm"):
        made = pinned_like(torch.ones(3, 2, dtype=torch.bfloat16))
    assert (made.shape, made.dtype) == ((3, 2), torch.bfloat16)
    assert caplog.messages == ["Host memory is not pinned, so copies are slower: CUDA error: out of memory"]
    weights = {"a": torch.arange(4.0), "b": torch.ones(2)}
    source = type("Source", (), {"device": torch.device("cuda"), "weights": lambda self, index: dict(weights)})()
    read = ModelSource._pinned_weights(source, 0)
    assert all(torch.equal(read[name], weights[name]) for name in weights)


def test_cast_where_it_is_needed() -> None:
    tensor = torch.randn(5, dtype=torch.bfloat16)
    assert moved(tensor, torch.device("cpu"), torch.bfloat16) is tensor
    assert torch.equal(moved(tensor, torch.device("cpu"), torch.float32), tensor.float())
    assert moved(tensor, torch.device("meta"), torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "GPU"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors …"), "GPU"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "GPU"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "GPU"),
        (RuntimeError("CUDA driver error: out of memory"), "GPU"),
        (RuntimeError("NCCL error: Cuda failure 'out of memory'"), "GPU"),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED"), "GPU"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), "CPU"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "CPU"),
        (MemoryError(), "CPU"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ValueError("CUDA out of memory"), None),
    ],
)
def test_which_memory_is_exhausted(error: BaseException, memory: str | None) -> None:
    assert exhausted(error) == memory
