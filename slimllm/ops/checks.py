"""Argument checks of the operations. Every error says what was wrong, what was received and what to do."""

from __future__ import annotations

import torch

ACTIVATIONS = (torch.float32, torch.float16, torch.bfloat16)
PRECISE = (torch.float64, torch.float32)


def check_tensors(**tensors: object) -> None:
    """Raise TypeError if an argument is not a tensor, ValueError if the tensors are not on one device."""
    devices = {}
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(
                f"{name} must be a torch.Tensor, got {type(value).__name__}; torch.as_tensor converts lists and arrays."
            )
        devices[name] = value.device
    if len(set(devices.values())) > 1:
        found = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{', '.join(devices)} must be on one device, got {found}; move them with .to(device).")


def check_dtype(name: str, tensor: torch.Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise TypeError if the tensor's dtype is not allowed."""
    if tensor.dtype not in allowed:
        first, *others = names = [str(dtype).removeprefix("torch.") for dtype in allowed]
        wanted = f"{', '.join(names[:-1])} or {names[-1]}" if others else first
        got = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{name} must be {wanted}, got {got}; convert it with .to(torch.{first}).")


def check_not_overlapping(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError if an output tensor has elements that share memory, as expanded tensors do."""
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape)):
        raise ValueError(f"{name} must have memory for every element, got an expanded tensor; make it with .clone().")


def check_floating(**tensors: torch.Tensor) -> None:
    """Raise TypeError if a tensor's dtype is not a floating dtype."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be of a floating dtype, got {tensor.dtype}; convert it with .float().")


def check_integer(name: str, value: object) -> None:
    """Raise TypeError if a value is not an integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}.")


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError if the tensor has a NaN or an infinity. Waits for the device."""
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity; check the activations that it was computed from.")
