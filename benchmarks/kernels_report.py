"""Compile every shipped kernel configuration ahead of time, without a GPU, and say what ptxas made of it.

    python benchmarks/kernels_report.py [--arch 80 86 90] [--json]

For each: registers, stack, spills, shared memory, and the tensor-core instructions in the machine code. A stack, a spill,
too much shared memory or a missing tensor-core instruction is a fault, and the exit status is then 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from slimllm.kernels import gram

SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}
TENSOR_CORES = {80: "HMMA", 86: "HMMA", 90: "HGMMA"}
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Variant:
    """A kernel as it is launched: the types of its arguments, its constants and its options."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    multiplies: bool = True
    aligned: tuple[str, ...] = ()


@dataclass
class Compiled:
    """What became of a variant on one architecture."""

    name: str
    arch: int
    registers: int
    stack: int
    spills: int
    shared_bytes: int
    tensor_core_instructions: int
    faults: list[str] = field(default_factory=list)


def gram_variants(arch: int) -> list[Variant]:
    """The Gram kernel for every dtype and every option in use, and its reduction over splits."""
    import torch

    variants = []
    for dtype in DTYPES:
        for options in ("", "partial", "pivot", "weight", "pivot weight", "tma", "tma partial"):
            tma = "tma" in options
            if (tma and (arch < 90 or dtype == "fp32")) or (dtype == "fp16" and options != "weight"):
                continue
            torch_dtype = getattr(torch, DTYPES[dtype])
            config = gram.choose_config(torch_dtype, "pivot" in options, "weight" in options, tma)
            tile = f"[{config.block_n}, {config.block_f}]"
            types = {
                "x": f"tensordesc<{dtype}{tile}>" if tma else f"*{dtype}", "tiles": "*i32", "gram": "*fp32",
                "total": "*fp64", "num_tokens": "i32", "features": "i32", "split_tokens": "i32", "stride_n": "i32",
                "stride_row": "i32",
            }  # fmt: skip
            constants: dict[str, Any] = {"BLOCK_N": config.block_n, "BLOCK_F": config.block_f, "TMA": tma, "ATOMIC": False}
            constants |= {"stride_f": 1, "stride_col": 1}
            for name, kind in (("pivot", "*fp32"), ("weight", "*fp32")):
                types |= {name: kind} if name in options else {}
                constants |= {} if name in options else {name: None}
            for name in ("partial", "partial_sums"):
                types |= {name: "*fp32"} if "partial" in options else {}
                constants |= {} if "partial" in options else {name: None}
            name = " ".join(["gram", dtype, options or "plain"])
            aligned = ("features", "stride_n", "stride_row", "split_tokens")  # as for any real width
            variants.append(
                Variant(name, gram.gram_kernel, types, constants, config.num_warps, config.num_stages, True, aligned)
            )
    for block in sorted({gram.PLAIN_CONFIG.block_f, gram.FLOAT_CONFIG.block_f}):
        types = {"tiles": "*i32", "gram": "*fp32", "total": "*fp64", "partial": "*fp32", "partial_sums": "*fp32"}
        types |= {"features": "i32", "num_splits": "i32", "stride_row": "i32"}
        constants = {"stride_col": 1, "BLOCK_F": block, "ROWS": gram.REDUCE_ROWS}
        variants.append(Variant(f"gram reduce {block}", gram.reduce_kernel, types, constants, 4, 3, False, ("stride_row",)))
    return variants


def compile_variant(name: str, arch: int) -> Compiled:
    """Compile one variant, found by its name, for one architecture."""
    (variant,) = (variant for variant in gram_variants(arch) if variant.name == name)
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
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    row = Compiled(
        name, arch, int(found[1]), int(found[2]), len(re.findall(r"\b(?:STL|LDL)\b", code)), compiled.metadata.shared,
        len(re.findall(rf"\b{TENSOR_CORES[arch]}\b", code)),
    )  # fmt: skip
    if row.stack or row.spills or row.registers > 255:
        row.faults.append("spills")
    if row.shared_bytes > SHARED_LIMIT[arch]:
        row.faults.append("too much shared memory")
    if variant.multiplies and not row.tensor_core_instructions:
        row.faults.append(f"no {TENSOR_CORES[arch]}")
    return row


def main() -> None:
    """Compile all and print a table, or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=sorted(SHARED_LIMIT), choices=sorted(SHARED_LIMIT))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    jobs = [(variant.name, arch) for arch in arguments.arch for variant in gram_variants(arch)]
    with ProcessPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        rows = list(pool.map(compile_variant, *zip(*jobs)))
    if arguments.json:
        for row in rows:
            print(json.dumps(asdict(row)))
    else:
        table = Table("kernel", "sm", "registers", "stack", "spills", "shared, bytes", "tensor-core instr.", "faults")
        for row in rows:
            table.add_row(*(", ".join(v) if isinstance(v, list) else str(v) for v in asdict(row).values()))
        Console(width=120).print(table)
    sys.exit(any(row.faults for row in rows))


if __name__ == "__main__":
    main()
