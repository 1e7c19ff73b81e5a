"""Triton kernels on simulated tensors, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from simulated_cuda.device import GPU, DeviceError
from simulated_cuda.dispatch import SimulatedTensor, inside


def interpret_on_the_inside() -> None:
    from triton.runtime import interpreter
    from triton.tools.tensor_descriptor import TensorDescriptor

    original = interpreter.GridExecutor.__call__

    def given(value: Any) -> Any:
        if isinstance(value, TensorDescriptor):
            more = [value.padding] if hasattr(value, "padding") else []
            return TensorDescriptor(inside(value.base), value.shape, value.strides, value.block_shape, *more)
        return inside(value)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [getattr(value, "base", value) for value in (*args, *kwargs.values())]
        tensors = [value for value in tensors if isinstance(value, torch.Tensor)]
        if any(isinstance(value, SimulatedTensor) for value in tensors):
            name = self.fn.__name__
            if not all(isinstance(value, SimulatedTensor) for value in tensors):
                raise DeviceError(f"{name} got tensors of the CPU")
            if not GPU.current:
                raise DeviceError(f"{name} was launched outside of torch.cuda.device")
            grid = self.grid if isinstance(self.grid, tuple) else self.grid(kwargs)
            assert 0 < grid[0] < 2**31 and all(0 < size <= 65535 for size in grid[1:]), f"{name} has the grid {grid}"
            GPU.launches[name] += 1
        with _disable_current_modes():
            return original(self, *map(given, args), **{name: given(value) for name, value in kwargs.items()})

    interpreter.GridExecutor.__call__ = call
