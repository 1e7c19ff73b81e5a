"""Tensors on the simulated device, and all operations on them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from simulated_cuda.device import DEVICE, GPU, DeviceError

aten = torch.ops.aten
_COPIES = {aten.copy_.default, aten._to_copy.default}
_INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
_EMPTY = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
# Operations of whose results CUDA has to tell the host the size, or that compute on the host in part.
_WAITING = {
    "nonzero",
    "_local_scalar_dense",
    "masked_select",
    "_unique2",
    "unique_dim",
    "equal",
    "repeat_interleave",
    "is_nonzero",
    "_linalg_eigh",
}
_NO_NUMBERS = {"mm", "addmm", "bmm", "baddbmm", "index_select", "cat", "addmv", "mv", "linear", "gather", "embedding"}
_IN_PLACE_VIEWS = {"squeeze_", "unsqueeze_", "t_", "transpose_"}
_METADATA = {"resize_", "set_", "as_strided_", "swapaxes_"}


class SimulatedTensor(torch.Tensor):
    """A tensor on the simulated device; `inside` is the CPU tensor with its values."""

    inside: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inside: torch.Tensor) -> SimulatedTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inside.shape,
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            layout=inside.layout,
            device=DEVICE,
        )

    def __init__(self, inside: torch.Tensor) -> None:
        self.inside = inside.detach()
        GPU.take(inside.untyped_storage(), self)

    def __repr__(self, **_: Any) -> str:
        return f"SimulatedTensor({tuple(self.shape)}, {self.dtype})"

    def data_ptr(self) -> int:
        return self.inside.data_ptr()

    def __format__(self, spec: str) -> str:
        return format(self.detach().cpu().item() if self.dim() == 0 else repr(self), spec)

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def is_pinned(self, device: Any = None) -> bool:
        return False

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            with torch.no_grad():
                made: Any = self.detach().clone()
            is_parameter = getattr(self, "_is_param", False)
            memo[id(self)] = torch.nn.Parameter(made, requires_grad=self.requires_grad) if is_parameter else made
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


class Simulation(TorchDispatchMode):
    """Mode in which all operations pass through `run`, also those without a tensor of the device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


def inside(value: Any) -> Any:
    """Return the CPU tensor of a simulated one, and anything else unchanged."""
    return value.inside if isinstance(value, SimulatedTensor) else value


def run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation of torch or of the package on host or device, with all checks."""
    name = function._schema.name.split("::")[1]
    if function.namespace == "slimllm":
        with Simulation():
            return GPU.operators[name](*args, **kwargs)
    flat, spec = tree_flatten((args, kwargs))
    simulated = [value for value in flat if isinstance(value, SimulatedTensor)]
    if function.namespace == "c10d":
        _check_collective(name, [value for value in flat if isinstance(value, torch.Tensor)])
    if not simulated and not _is_device(kwargs.get("device")):
        return _on_host(function, flat, args, kwargs)
    if name in _IN_PLACE_VIEWS:
        with torch.utils._mode_utils.no_dispatch():
            function(*args, **kwargs)
        function(args[0].inside, *args[1:], **kwargs)
        return args[0]
    if name in _METADATA:
        raise NotImplementedError(f"{function} changes the metadata of a wrapper")
    _check_devices(function, name, args, flat)
    if name in _WAITING or _indexes_by_mask(function, args):
        GPU.wait(name)
    if function is aten._to_copy.default:
        return _converted(function, args[0], kwargs)
    if function is aten.copy_.default:
        target, source = args[:2]
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        is_number = source.dim() == 0 and not isinstance(source, SimulatedTensor)
        if isinstance(target, SimulatedTensor) != isinstance(source, SimulatedTensor) and not is_number:
            GPU.copy(source, isinstance(target, SimulatedTensor), non_blocking, inside(target))
        function(inside(target), inside(source))
        return target
    if function is aten.is_pinned.default:
        return False
    inner_args, inner_kwargs = tree_unflatten([inside(value) for value in flat], spec)
    inner_kwargs.pop("pin_memory", None)
    if inner_kwargs.get("device") is not None:
        inner_kwargs["device"] = torch.device("cpu")
    if function.namespace == "slimllm_C":
        GPU.launches[name] += 1
        assert all(value.is_contiguous() for value in simulated), f"{name} got a tensor that is not contiguous"
    if function is aten.addmm.dtype_out:  # CUDA alone has it
        added, left, right = (one.to(inner_args[3]) for one in inner_args[:3])
        result = torch.addmm(added, left, right, out=inner_kwargs["out"])
    else:
        result = function(*inner_args, **inner_kwargs)
    on_host = kwargs.get("device") is not None and not _is_device(kwargs["device"])
    if function in _EMPTY and not on_host:
        _poison(result)
    return result if on_host else _wrapped(function, args, kwargs, result)


def _check_collective(name: str, tensors: list[torch.Tensor]) -> None:
    """Count a collective operation by the device of its tensors, which NCCL wants to be contiguous."""
    if tensors and not all(value.is_contiguous() for value in tensors):
        raise DeviceError(f"{name} got a tensor that is not contiguous")
    for device in {value.device.type for value in tensors}:
        GPU.collectives[f"{name} {device}"] += 1


def _on_host(function: Any, flat: list[Any], args: Any, kwargs: dict[str, Any]) -> Any:
    GPU.check_host(function, flat)
    if kwargs.get("pin_memory"):
        made = function(*args, **{**kwargs, "pin_memory": False})
        return tree_map_only(torch.Tensor, GPU.pin, made)
    if function is aten.is_pinned.default:
        return GPU.is_pinned(args[0])
    if function is aten._pin_memory.default:
        return GPU.pin(args[0].clone())
    return function(*args, **kwargs)


def _check_devices(function: Any, name: str, args: Any, flat: list[Any]) -> None:
    others = [value for value in flat if isinstance(value, torch.Tensor) and not isinstance(value, SimulatedTensor)]
    if (
        function in _COPIES
        or not others
        or len(others) == len([value for value in flat if isinstance(value, torch.Tensor)])
    ):
        return
    if any(value.device.type == "meta" for value in others):
        raise DeviceError(f"{function} got tensors on meta and on {DEVICE}")
    large = [value for value in others if value.dim() > 0]
    indices = function in _INDEXING and isinstance(args[0], SimulatedTensor)
    if large and indices and all(not value.is_floating_point() for value in large):
        GPU.wait("indices on the host")
    elif large or name in _NO_NUMBERS:
        shapes = [(tuple(value.shape), str(value.device)) for value in flat if isinstance(value, torch.Tensor)]
        raise DeviceError(f"Expected all tensors to be on the same device: {function} got {shapes}")


def _indexes_by_mask(function: Any, args: Any) -> bool:
    """Return whether CUDA has to count the elements of a mask."""
    indices = (args[1] if function in _INDEXING else None) or []
    return any(isinstance(index, SimulatedTensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _converted(function: Any, source: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    device = kwargs.get("device")
    to_device = _is_device(device) or (device is None and isinstance(source, SimulatedTensor))
    rest = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory", "non_blocking")}
    result: torch.Tensor = function(inside(source), **rest)
    if isinstance(source, SimulatedTensor) != to_device:
        GPU.copy(source, to_device, kwargs.get("non_blocking", False), result)
    if device is not None and torch.device(device).type == "meta":
        return result.to("meta")
    return SimulatedTensor(result) if to_device else result


def _wrapped(function: Any, args: Any, kwargs: dict[str, Any], result: Any) -> Any:
    """Wrap results; an argument that was written to is returned as it was given."""
    returns = function._schema.returns
    several = isinstance(result, (tuple, list)) and len(returns) > 1
    made = []
    for value, described in zip(result if several else [result], returns):
        alias = described.alias_info
        if alias is None or not alias.is_write:
            made.append(tree_map_only(torch.Tensor, SimulatedTensor, value))
            continue
        for position, argument in enumerate(function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.before_set == alias.before_set:
                target = args[position] if position < len(args) else kwargs[argument.name]
                if isinstance(target, SimulatedTensor) and target.shape != target.inside.shape:
                    raise NotImplementedError(f"{function} resized a wrapper")
                made.append(target)
                break
    if not returns:
        return None
    return (type(result)(made) if type(result) is list else tuple(made)) if several else made[0]


def _is_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _poison(tensor: torch.Tensor) -> None:
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(float("nan"))
    elif tensor.dtype == torch.bool:
        tensor.fill_(True)
    else:
        tensor.fill_(torch.iinfo(tensor.dtype).max)
