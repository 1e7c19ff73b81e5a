"""A CUDA device simulated on the CPU, to run the GPU path, and find its faults, on machines without a GPU.

    PYTHONPATH=tests/gpu SIMULATED_CUDA=1 TRITON_INTERPRET=1 python …     (make test-simulated-gpu)

Every Python process with this environment has the device, which sitecustomize.py beside this folder installs. Tensors on
"cuda:0" are wrappers of CPU tensors, `SimulatedTensor`, and `torch.cuda` describes one GPU. Every operation is checked:

- Tensors of the CPU and of the device in one operation raise DeviceError, except in copies, as indices and as numbers.
- Memory that is not initialised is full of NaN, or of the largest integer.
- Pinned memory must not be written while a copy from it is in flight, nor the target of a copy to the host be read or
  written; both raise RaceError. A wait of the host ends all copies.
- `GPU.waits` counts the waits of the host by cause, `GPU.launches` the kernels, `GPU.collectives` the operations of process
  groups by device, whose tensors have to be contiguous. `GPU.now` and `GPU.peak` are the bytes of all tensors on the
  device, in blocks of 512, as torch's allocator has them; more than `GPU.limit` is out of memory.

Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1) behind the real dispatch: on the tensors inside, with
checks that all are on the device and that the device is the current one. SIMULATED_CAPABILITY (9.0) and
SIMULATED_PROCESSORS (132) choose the GPU.

It cannot show: backward passes, which want a real device; asynchronous errors; races between the threads of a kernel;
times; the results and workspaces of cuBLAS and cuSOLVER; fragmentation of memory; several GPUs; torch.compile and opcheck.
Operations of other threads are not checked. Tied weights part on `.to("cuda")`. Tests of these are marked `real_device`.
"""

from simulated_cuda.device import GPU, DeviceError, RaceError
from simulated_cuda.dispatch import SimulatedTensor
from simulated_cuda.torch_cuda import install

__all__ = ["GPU", "DeviceError", "RaceError", "SimulatedTensor", "install"]
