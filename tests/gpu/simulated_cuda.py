"""A CUDA device simulated on the CPU, to run the GPU path, and find its faults, on machines without a GPU.

    python -m pytest -p simulated_cuda …   in a process of its own, with this folder on PYTHONPATH (make test-simulated-gpu)

Tensors on "cuda:0" are wrappers of CPU tensors, `SimulatedTensor`, and `torch.cuda` describes one GPU. Every operation is
checked:

- Tensors of the CPU and of the device in one operation raise DeviceError, except in copies, as indices and as numbers.
- Memory that is not initialised is full of NaN, or of the largest integer.
- Pinned memory must not be written while a copy from it is in flight, nor the target of a copy to the host be read or
  written; both raise RaceError. A wait of the host ends all copies.
- `GPU.waits` counts the waits of the host by their cause, `GPU.launches` the kernels, and `GPU.now` and `GPU.peak` are the
  bytes of all tensors on the device, in blocks of 512, as torch's allocator has them.

Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1) behind the real dispatch: on the tensors inside, with
checks that all are on the device and that the device is the current one. SIMULATED_CAPABILITY (9.0) and
SIMULATED_PROCESSORS (132) choose the GPU.

It cannot show: backward passes, which want a real device; asynchronous errors; races between the threads of a kernel;
times; the results and workspaces of cuBLAS and cuSOLVER; fragmentation of memory; several GPUs; torch.compile and opcheck.
Tied weights part on `.to("cuda")`.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
CAPABILITY = tuple(map(int, os.environ.get("SIMULATED_CAPABILITY", "9.0").split(".")))
PROCESSORS = int(os.environ.get("SIMULATED_PROCESSORS", "132"))
MEMORY = 80 * 2**30
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


class DeviceError(RuntimeError):
    """Tensors of several devices in one operation."""


class RaceError(RuntimeError):
    """Access to host memory with which a copy is still at work."""


class Gpu:
    """State of the simulated GPU: memory, copies in flight, and counters."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._users: dict[int, tuple[int, int]] = {}  # by storage: wrappers and bytes
        self._pinned: dict[int, StorageWeakRef] = {}
        self._read: set[int] = set()  # storages that copies to the device still read
        self._written: set[int] = set()  # storages that copies to the host still write
        self.current: list[Any] = []  # devices entered by `torch.cuda.device`
        self.operators: dict[str, Callable[..., Any]] = {}  # of the package, by name
        self.now = self.peak = 0
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self.waits: collections.Counter[str] = collections.Counter()
        self.launches: collections.Counter[str] = collections.Counter()
        self.peak = self.now

    def take(self, storage: torch.UntypedStorage, user: object) -> None:
        """Count the memory of a storage until its last user is gone."""
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        with self._lock:
            users, _ = self._users.get(key, (0, 0))
            self._users[key] = users + 1, size
            if not users:
                self.now += size
                self.peak = max(self.peak, self.now)
        weakref.finalize(user, self._give_back, key)

    def _give_back(self, key: int) -> None:
        with self._lock:
            users, size = self._users.pop(key)
            if users > 1:
                self._users[key] = users - 1, size
            else:
                self.now -= size

    def wait(self, cause: str) -> None:
        """Let the host wait for the device."""
        self.waits[cause] += 1
        self._read.clear()
        self._written.clear()

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Declare the memory of a CPU tensor pinned."""
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = StorageWeakRef(storage)
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        known = self._pinned.get(tensor.untyped_storage()._cdata)
        return known is not None and not known.expired()

    def copy(self, source: torch.Tensor, to_device: bool, non_blocking: bool, result: torch.Tensor) -> None:
        """Note a copy between host and device."""
        if to_device and non_blocking and self.is_pinned(source):
            self._read.add(source.untyped_storage()._cdata)
        elif not to_device and non_blocking:
            self._written.add(result.untyped_storage()._cdata)
        else:
            self.wait("copy to the device" if to_device else "copy to the host")

    def check_host(self, function: Any, flat: list[Any]) -> None:
        """Raise RaceError if an operation of the CPU touches memory with which a copy is at work."""
        if not (self._read or self._written):
            return
        for argument, value in zip(function._schema.arguments, flat):
            if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
                continue
            key = value.untyped_storage()._cdata
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if key in self._written:
                raise RaceError(f"{function} touches host memory that a copy from the device is still writing.")
            if writes and key in self._read:
                raise RaceError(f"{function} overwrites pinned memory that a copy to the device is still reading.")


GPU = Gpu()


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
    result = function(*inner_args, **inner_kwargs)
    on_host = kwargs.get("device") is not None and not _is_device(kwargs["device"])
    if function in _EMPTY and not on_host:
        _poison(result)
    return result if on_host else _wrapped(function, args, kwargs, result)


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


class _Properties:
    name = "simulated NVIDIA GPU"
    major, minor = CAPABILITY
    total_memory = MEMORY
    multi_processor_count = PROCESSORS
    warp_size = 32
    gcnArchName = ""


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        GPU.wait("event")


class _Stream(_Event):
    cuda_stream = 0

    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()


class _CurrentDevice:
    def __init__(self, device: Any) -> None:
        _check_index(device)

    def __enter__(self) -> None:
        GPU.current.append(self)

    def __exit__(self, *_: Any) -> None:
        GPU.current.pop()


def _check_index(device: Any = None) -> None:
    index = torch.device(device).index if isinstance(device, (str, torch.device)) else device
    if index not in (None, 0):
        raise RuntimeError(f"there is no device {device}, only {DEVICE}")


def _of_device(value: Callable[[], Any]) -> Callable[..., Any]:
    """Make a function of torch.cuda that takes a device, the one that there is."""

    def function(device: Any = None, *_: Any, **__: Any) -> Any:
        _check_index(device)
        return value()

    return function


def install() -> None:
    """Pretend from now on, in this thread, that there is one GPU. Call this before the package is imported."""
    assert "slimllm.ops.registry" not in sys.modules, "the simulated device was installed after slimllm was imported"
    if torch.version.cuda:
        torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]
    else:
        ctypes.CDLL(str(_device_guard()))
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    fakes: dict[str, Any] = {
        **{name: lambda *_, **__: True for name in ("is_available", "is_initialized", "is_bf16_supported")},
        **{name: lambda *_, **__: None for name in ("init", "_lazy_init", "empty_cache", "ipc_collect", "manual_seed_all")},
        **{name: _of_device(lambda: None) for name in ("set_device", "manual_seed", "set_per_process_memory_fraction")},
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": _of_device(lambda: GPU.wait("synchronize")),
        "get_device_properties": _of_device(lambda: _Properties),
        "get_device_name": _of_device(lambda: _Properties.name),
        "get_device_capability": _of_device(lambda: CAPABILITY),
        "mem_get_info": _of_device(lambda: (MEMORY - GPU.now, MEMORY)),
        "memory_allocated": _of_device(lambda: GPU.now),
        "memory_reserved": _of_device(lambda: GPU.now),
        "max_memory_allocated": _of_device(lambda: GPU.peak),
        "max_memory_reserved": _of_device(lambda: GPU.peak),
        "reset_peak_memory_stats": _of_device(lambda: setattr(GPU, "peak", GPU.now)),
        "current_stream": _of_device(_Stream),
        "default_stream": _of_device(_Stream),
        "stream": lambda stream: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": _of_device(lambda: torch.zeros(16, dtype=torch.uint8)),
        "set_rng_state": lambda *_: None,
        "get_arch_list": lambda: [f"sm_{CAPABILITY[0]}{CAPABILITY[1]}"],
        "Event": _Event,
        "Stream": _Stream,
        "device": _CurrentDevice,
        "_initialized": True,
    }
    for name, value in fakes.items():
        setattr(torch.cuda, name, value)
    _keep_operators()
    torch.Tensor.pin_memory = lambda self, device=None: GPU.pin(self.clone())  # type: ignore[method-assign]
    torch.Tensor.is_pinned = lambda self, device=None: GPU.is_pinned(self)  # type: ignore[method-assign]
    if os.environ.get("TRITON_INTERPRET") == "1":
        _interpret_on_the_inside()
    Simulation().__enter__()


def _keep_operators() -> None:
    """Keep the functions of the package's operators, which run on simulated tensors, not on those inside."""
    original = torch.library.Library.impl

    def impl(self: Any, name: Any, function: Any, *rest: Any, **more: Any) -> Any:
        if getattr(self, "ns", "") == "slimllm" and isinstance(name, str):
            GPU.operators[name] = function
        return original(self, name, function, *rest, **more)

    torch.library.Library.impl = impl  # type: ignore[method-assign]


def _interpret_on_the_inside() -> None:
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


def _device_guard() -> Path:
    """Build the guard of a CUDA device, which does nothing, for a torch that was built for the CPU alone."""
    source = Path(__file__).with_name("device_guard.cpp")
    library = Path(tempfile.gettempdir()) / f"slimllm-device-guard-{os.getuid()}-{torch.__version__}.so"
    if not library.is_file() or library.stat().st_mtime < source.stat().st_mtime:
        root = Path(torch.__file__).parent
        with tempfile.NamedTemporaryFile(dir=library.parent, suffix=".so", delete=False) as made:
            command = ["c++", "-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", str(source)]
            subprocess.run([*command, f"-L{root / 'lib'}", "-lc10", "-o", made.name], check=True)
        os.replace(made.name, library)
    return library


if "pytest" in sys.modules:  # as a plug-in
    install()
