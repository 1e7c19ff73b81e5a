"""Builds the optional C++ extension; everything else is in pyproject.toml.

SLIMLLM_BUILD_EXT: `auto` (default) builds it where there are a compiler and torch 2.11 or later (visible to the build with
--no-build-isolation) and says in one line what it did, `1` fails loudly if it cannot be built, `0` leaves it out.
"""

import os
import sys
from typing import Any

from setuptools import setup

MODES = ("auto", "1", "0")
SOURCES = ["csrc/module.cpp", "csrc/lstsq.cpp"]
# The part of torch's stable ABI that is used, that of 2.11: one build runs on that version and all later ones.
STABLE_ABI = "0x020b000000000000"


def extension_arguments() -> dict[str, Any]:
    """The arguments of setup() that build the extension, or none."""
    mode = os.environ.get("SLIMLLM_BUILD_EXT", "auto")
    if mode not in MODES:
        sys.exit(f"SLIMLLM_BUILD_EXT must be one of {', '.join(MODES)}, got {mode!r}.")
    if mode == "0":
        print("slimllm: extension left out (SLIMLLM_BUILD_EXT=0)")
        return {}
    missing = missing_for_build()
    if missing:
        if mode == "1":
            sys.exit(f"slimllm: the extension cannot be built: {missing}")
        print(f"slimllm: extension not built, torch does its work ({missing})")
        return {}
    import pybind11
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):  # type: ignore[misc]
        """Builds the extension, or says in one line why not."""

        def run(self) -> None:
            try:
                super().run()
                print("slimllm: extension slimllm._C built")
            except (Exception, SystemExit) as error:
                if mode == "1":
                    raise
                self.extensions: list[Any] = []
                print(f"slimllm: extension not built, torch does its work ({' '.join(str(error).split())[:300]})")

    flags = ["-O3", "-g0", "-std=c++17", "-Wall", "-Wextra", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
    extension = CppExtension(
        "slimllm._C", SOURCES, include_dirs=[pybind11.get_include()], extra_compile_args={"cxx": flags}
    )
    # Headers of others are theirs to keep clean of warnings.
    extension.extra_compile_args["cxx"] += [f"-isystem{folder}" for folder in extension.include_dirs]
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


def missing_for_build() -> str:
    """What the build of the extension lacks, or nothing."""
    try:
        import pybind11  # noqa: F401
        import torch.utils.cpp_extension
    except ImportError as error:
        return f"{error.name} cannot be imported while building; install it first and use --no-build-isolation"
    except Exception as error:  # a torch that is broken is no reason to fail
        return f"torch does not load: {type(error).__name__}: {error}"
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        return f"torch {torch.__version__} is older than 2.11, whose stable ABI it is written for"
    return ""


setup(**extension_arguments())
