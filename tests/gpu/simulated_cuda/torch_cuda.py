"""`torch.cuda` of a machine with one GPU, and its installation."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from simulated_cuda.device import CAPABILITY, DEVICE, GPU, MEMORY, PROCESSORS
from simulated_cuda.dispatch import Simulation
from simulated_cuda.kernels import interpret_on_the_inside


class _Properties:
    name = "simulated NVIDIA GPU"
    major, minor = CAPABILITY
    total_memory = MEMORY
    multi_processor_count = PROCESSORS
    warp_size = 32
    gcnArchName = ""


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        self._recorded, self._waits = 0.0, 0

    def record(self, *_: Any) -> None:
        self._recorded, self._waits = time.perf_counter(), sum(GPU.waits.values())

    def elapsed_time(self, end: Any) -> float:
        if end._waits == sum(GPU.waits.values()):
            raise RuntimeError("the host did not wait for the event")
        return 1e3 * float(end._recorded - self._recorded)

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
        **{name: _of_device(lambda: None) for name in ("set_device", "manual_seed")},
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
        "set_per_process_memory_fraction": lambda part, device=None: setattr(GPU, "limit", int(part * MEMORY)),
        "_sleep": lambda cycles: None,
        "Event": _Event,
        "Stream": _Stream,
        "device": _CurrentDevice,
        "_initialized": True,
    }
    for name, value in fakes.items():
        setattr(torch.cuda, name, value)
    torch.Generator = _Generator  # type: ignore[misc]
    _keep_operators()
    torch.empty = _empty  # other threads have no mode
    torch.Tensor.pin_memory = lambda self, device=None: GPU.pin(self.clone())  # type: ignore[method-assign]
    torch.Tensor.is_pinned = lambda self, device=None: GPU.is_pinned(self)  # type: ignore[method-assign]
    if os.environ.get("TRITON_INTERPRET") == "1":
        interpret_on_the_inside()
    Simulation().__enter__()


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls, "cpu")


_unpinned = torch.empty


def _empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
    made = _unpinned(*args, **kwargs)
    return GPU.pin(made) if pin_memory and made.device.type == "cpu" else made


def _keep_operators() -> None:
    """Keep the functions of the package's operators, which run on simulated tensors, not on those inside."""
    original = torch.library.Library.impl

    def impl(self: Any, name: Any, function: Any, *rest: Any, **more: Any) -> Any:
        if getattr(self, "ns", "") == "slimllm" and isinstance(name, str):
            GPU.operators[name] = function
        return original(self, name, function, *rest, **more)

    torch.library.Library.impl = impl  # type: ignore[method-assign]


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
