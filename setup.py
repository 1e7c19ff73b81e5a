"""Build of the optional extension; everything else is in pyproject.toml.

SLIMLLM_BUILD_EXT: `auto` (default) builds the extension if there are a compiler and torch 2.11 or later (visible to the
build with --no-build-isolation), and prints the outcome in one line; `1` fails if it cannot be built; `0` leaves it out.
The CUDA part needs a torch for CUDA and nvcc (CUDA_HOME). It is built for the architectures in TORCH_CUDA_ARCH_LIST, else
for those of the visible GPUs, else for 8.0, 8.6 and 9.0. If it cannot be built, `auto` builds the rest, and
`slimllm doctor` says why.
"""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from setuptools import setup

MODES = ("auto", "1", "0")
SOURCES = ["csrc/module.cpp", "csrc/lstsq.cpp", "csrc/elimination.cpp", "csrc/substitution.cpp"]
CUDA_SOURCES = ["csrc/lstsq_cuda.cu", "csrc/substitution_cuda.cu"]
# Target version of torch's stable ABI, 2.11: one build runs on that version and all later ones.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"


def extension_arguments() -> dict[str, Any]:
    """Return the arguments of setup() that build the extension, or none."""
    mode = os.environ.get("SLIMLLM_BUILD_EXT", "auto")
    if mode not in MODES:
        sys.exit(f"SLIMLLM_BUILD_EXT must be one of {', '.join(MODES)}, got {mode!r}.")
    if mode == "0":
        old = sorted(str(path) for path in Path("slimllm").glob("_C.*"))
        rest = f"; delete that of an earlier build to stop using it: {', '.join(old)}" if old else ""
        print(f"slimllm: extension left out (SLIMLLM_BUILD_EXT=0){rest}")
        return {}
    missing = missing_for_build()
    if missing:
        if mode == "1":
            sys.exit(f"slimllm: the extension cannot be built: {missing}")
        print(f"slimllm: extension not built; torch is used instead ({missing})")
        return {}
    from torch.utils.cpp_extension import BuildExtension

    without = without_cuda()
    wanted = extension(without)

    class Build(BuildExtension):  # type: ignore[misc]
        """Build step that makes the extension, or prints in one line why it could not."""

        def run(self) -> None:
            before = {name: getattr(self, name) for name in ("compiler", "inplace")}
            printed: list[str] = []
            try:
                with recorded(printed):
                    super().run()
                print(f"slimllm: extension slimllm._C built{'' if without else ' with CUDA'}")
            except (Exception, SystemExit) as error:
                why = reason(error, printed)
                if mode == "1":
                    sys.exit(
                        f"slimllm: the extension cannot be built: {why}. It needs a working C++ compiler and, "
                        "for a torch with CUDA, nvcc of the same version or none; SLIMLLM_BUILD_EXT=0 leaves it out."
                    )
                if without:
                    self.give_up(why)
                    return
                vars(wanted).update(vars(extension(why)))  # keeps the attributes that distutils set
                self.__dict__.update(before)
                try:
                    with recorded(printed):
                        super().run()
                    print(f"slimllm: extension slimllm._C built without CUDA ({why})")
                except (Exception, SystemExit) as another:
                    self.give_up(reason(another, printed))

        def give_up(self, why: str) -> None:
            # Delete the result of an earlier build, so that it does not pass for this one's.
            old = Path(self.build_lib, *self.get_ext_filename("slimllm._C").split("/"))
            old.unlink(missing_ok=True)
            self.extensions: list[Any] = []
            print(f"slimllm: extension not built; torch is used instead ({why})")

    return {"ext_modules": [wanted], "cmdclass": {"build_ext": Build}}


@contextmanager
def recorded(printed: list[str]) -> Iterator[None]:
    """Print what this process and the compilers print when they are done, and put its lines into the list."""
    sys.stdout.flush()
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        before = os.dup(1), os.dup(2)
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        try:
            yield
        finally:
            sys.stdout.flush()
            for stream, old in zip((1, 2), before):
                os.dup2(old, stream)
                os.close(old)
            file.seek(0)
            printed[:] = file.read().splitlines()
            print("\n".join(printed))


def reason(error: BaseException, printed: list[str]) -> str:
    """Return the first error that a compiler printed, or else the exception's message: one line, up to 300 characters."""
    found = [line for line in printed if re.search(r"\b(fatal error|error|unsupported)\b", line, re.IGNORECASE)]
    message = " ".join(map(str, error.args))
    return " ".join((found[0] if found and re.search("compiling objects|exit code", message) else message).split())[:300]


def extension(without: str) -> Any:
    """Return the extension; without its CUDA part if there is a reason for that."""
    import pybind11
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    flags = ["-O3", "-g0", "-std=c++17", "-Wall", "-Wextra", STABLE_ABI]
    arguments: dict[str, Any] = {"include_dirs": [pybind11.get_include()], "extra_compile_args": {"cxx": flags}}
    if not without:
        architectures = choose_architectures()
        flags += [f'-DSLIMLLM_CUDA_ARCHITECTURES="{architectures}"', f'-DSLIMLLM_CUDA="{cuda_version()}"']
        arguments["extra_compile_args"]["nvcc"] = ["-O3", "-std=c++17", "-DUSE_CUDA", STABLE_ABI]
        made = CUDAExtension("slimllm._C", SOURCES + CUDA_SOURCES, **arguments)
    else:
        flags.append('-DSLIMLLM_WITHOUT_CUDA="{}"'.format(re.sub(r"[^\w .,:;()/+-]", " ", without)))
        made = CppExtension("slimllm._C", SOURCES, **arguments)
    # System headers: suppresses warnings from third-party headers.
    made.extra_compile_args["cxx"] += [f"-isystem{folder}" for folder in made.include_dirs]
    return made


def without_cuda() -> str:
    """Return why there cannot be a CUDA part, or an empty string."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if not torch.version.cuda:
        return "this torch is for CPUs"
    if not CUDA_HOME:
        return "there is no nvcc; set CUDA_HOME to CUDA's folder"
    return "" if (Path(CUDA_HOME) / "bin" / "nvcc").exists() else f"there is no nvcc in {CUDA_HOME}, which CUDA_HOME names"


def cuda_version() -> str:
    """Return the version of CUDA that torch was built for, which nvcc must match."""
    import torch

    return str(torch.version.cuda)


def choose_architectures() -> str:
    """Set TORCH_CUDA_ARCH_LIST, which torch's build reads, if it is unset or `native`; return it."""
    import torch

    if os.environ.get("TORCH_CUDA_ARCH_LIST", "native") in ("", "native"):
        found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
        names = ";".join(f"{major}.{minor}" for major, minor in sorted(found))
        os.environ["TORCH_CUDA_ARCH_LIST"] = names or "8.0;8.6;9.0+PTX"
    wanted = os.environ["TORCH_CUDA_ARCH_LIST"].replace(";", " ").split()
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(wanted)
    return ";".join(wanted)


def missing_for_build() -> str:
    """Return what the build of the extension lacks, or an empty string."""
    try:
        import pybind11  # noqa: F401
        import torch.utils.cpp_extension
    except ImportError as error:
        return f"{error.name} cannot be imported while building; install it first and use --no-build-isolation"
    except Exception as error:  # a broken torch must not make the installation fail
        return f"torch does not load: {type(error).__name__}: {error}"
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        return f"torch {torch.__version__} is older than 2.11, whose stable ABI the extension needs"
    return ""


setup(**extension_arguments())
