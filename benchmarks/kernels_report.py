"""Compile every shipped kernel configuration ahead of time, without a GPU, and report the resources it uses.

    python benchmarks/kernels_report.py [--arch 80 86 90 120] [--every 8] [--json]

The first table lists registers, stack, spills, shared memory, and tensor-core instructions in the machine code of the
Triton kernels and, if there is nvcc, of the extension's (without the shared memory that a launch asks for). A stack, a
spill, too much shared memory or a missing tensor-core instruction is a fault; the exit status is then 1. The second table
lists the work of each kernel at real shapes, and the lower bound of its time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import shapes
import triton
from kernel_variants import variants
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CSRC = Path(__file__).resolve().parents[1] / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin")
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}


@dataclass
class Compiled:
    """Compilation result of a variant on one architecture."""

    name: str
    arch: int
    registers: int
    stack: int
    spills: int
    shared_bytes: int
    tensor_core_instructions: int
    faults: list[str] = field(default_factory=list)


def compile_variant(name: str, arch: int) -> Compiled:
    """Compile one variant, found by its name, for one architecture."""
    (variant,) = (variant for variant in variants(arch) if variant.name == name)
    names = variant.kernel.arg_names
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name in variant.aligned
    }
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    source = ASTSource(variant.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = dumped("-res-usage", file.name), dumped("-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    instruction = variant.tensor_cores if arch == 90 else "HMMA"  # wgmma is Hopper's alone
    row = Compiled(
        name,
        arch,
        int(found[1]),
        int(found[2]),
        len(re.findall(r"\b(?:STL|LDL)\b", code)),
        compiled.metadata.shared,
        len(re.findall(rf"\b{instruction}\b", code)) if variant.tensor_cores else 0,
    )
    if row.stack or row.spills or row.registers > 255:
        row.faults.append("spills")
    if row.shared_bytes > SHARED_LIMIT[arch]:
        row.faults.append("too much shared memory")
    if variant.tensor_cores and not row.tensor_core_instructions:
        row.faults.append(f"no {instruction}")
    return row


def dumped(what: str, cubin: str) -> str:
    """Return what cuobjdump prints of a compiled file."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, what, cubin], capture_output=True, text=True, check=True).stdout


def compile_extension(source: str, arch: int) -> list[Compiled]:
    """Compile the kernels of one CUDA source of the extension for one architecture."""
    from torch.utils.cpp_extension import include_paths

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/kernels.cubin"
        command = [str(NVCC), "-cubin", "-std=c++17", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
        command += [f"-arch=sm_{arch}{'a' if arch >= 90 else ''}", *(f"-isystem={path}" for path in include_paths())]
        subprocess.run([*command, str(CSRC / source), "-o", cubin], check=True)
        usage, code = dumped("-res-usage", cubin), dumped("-sass", cubin)
    for name, registers, stack, shared in re.findall(r"Function (\S+):\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage):
        own = code.partition(f"Function : {name}\n")[2].partition("Function : ")[0]
        spills = len(re.findall(r"\b(?:STL|LDL)\b", own))
        title = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout
        title = re.sub(r"void |slimllm::|\(anonymous namespace\)::|\(.*", "", title.strip())
        title = f"{source}: {title}"
        faults = ["spills"] if int(stack) or spills else []
        rows.append(Compiled(title, arch, int(registers), int(stack), spills, int(shared), 0, faults))
    return rows


def work_table() -> Table:
    """Make the table of work, arithmetic intensity and floors of each kernel at the shapes of LLaMA-7B and 33B."""
    tokens = 4096
    table = Table("kernel", "shape", "10⁹ operations", "10⁶ bytes", "operations/byte", "dtype", title=f"{tokens} tokens")
    for gpu in (shapes.A100, shapes.H100):
        table.add_column(f"floor on {gpu.name}, ms: operations, bytes")
    for name in ("llama-7b", "llama-33b"):
        shape = shapes.SHAPES[name]
        works = {
            f"gram bf16, {shape.intermediate_size} features": shapes.gram_work(tokens, shape.intermediate_size),
            f"gram bf16, {shape.hidden_size} features": shapes.gram_work(tokens, shape.hidden_size),
            f"gram fp32, {shape.hidden_size} features": shapes.gram_work(tokens, shape.hidden_size, 4),
            "pearson gram-blocks": shapes.head_covariance_work(shape),
            "pearson stream": shapes.stream_work(shape, tokens),
            "exchange, a quarter of the heads": shapes.exchange_work(shape, shape.units // 4),
            f"columns, {shape.intermediate_size} features": shapes.columns_work(shape, tokens),
            "cosine": shapes.cosine_work(shape, tokens),
            "half-solution, in place": shapes.half_solve_work(shape),
        }
        for kernel, work in works.items():
            floors = [", ".join(f"{1e3 * s:.3f}" for s in work.floor_s(gpu)) for gpu in (shapes.A100, shapes.H100)]
            numbers = [f"{work.operations / 1e9:.1f}", f"{work.num_bytes / 1e6:.0f}", f"{work.intensity:.1f}"]
            table.add_row(kernel, name, *numbers, work.dtype, *floors)
    return table


def main() -> None:
    """Compile all and print two tables, or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=sorted(SHARED_LIMIT), choices=sorted(SHARED_LIMIT))
    parser.add_argument("--every", type=int, default=1, help="Compile only every Nth configuration, not the extension.")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    jobs = [(variant.name, arch) for arch in arguments.arch for variant in variants(arch)[:: arguments.every]]
    with ProcessPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        rows = list(pool.map(compile_variant, *zip(*jobs)))
        if NVCC and arguments.every == 1:
            of_extension = [(path.name, arch) for arch in arguments.arch for path in sorted(CSRC.glob("*.cu"))]
            rows += [row for found in pool.map(compile_extension, *zip(*of_extension)) for row in found]
    if arguments.json:
        for row in rows:
            print(json.dumps(asdict(row)))
    else:
        table = Table("kernel", "sm", "registers", "stack", "spills", "shared, bytes", "tensor-core instr.", "faults")
        for row in rows:
            table.add_row(*(", ".join(v) if isinstance(v, list) else str(v) for v in asdict(row).values()))
        console = Console(width=140)
        console.print(table)
        console.print(
            "partial: tokens are split over programs, whose tiles are stored separately; tma: input is read by tensor "
            "descriptors; unaligned: rows begin at any address; transposed: features are not adjacent in memory.\n"
            "A fault is a stack, a spill, too much shared memory, or a missing tensor-core instruction.",
            style="dim",
        )
        console.print(work_table())
    sys.exit(any(row.faults for row in rows))


if __name__ == "__main__":
    main()
