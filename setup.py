"""Builds the optional C++ extension; everything else is in pyproject.toml.

SLIMLLM_BUILD_EXT: `auto` (default) builds it where there is a compiler and says in one line what it did, `1` fails
loudly if it cannot be built, `0` leaves it out.
"""

import os
import sys
from typing import Any

from setuptools import setup

MODES = ("auto", "1", "0")


def extension_arguments() -> dict[str, Any]:
    """The arguments of setup() that build the extension, or none."""
    mode = os.environ.get("SLIMLLM_BUILD_EXT", "auto")
    if mode not in MODES:
        sys.exit(f"SLIMLLM_BUILD_EXT must be one of {', '.join(MODES)}, got {mode!r}.")
    if mode == "0":
        print("slimllm: extension left out (SLIMLLM_BUILD_EXT=0)")
        return {}
    from pybind11.setup_helpers import Pybind11Extension, build_ext

    class BuildExtension(build_ext):
        """Builds the extension, or says in one line why not."""

        def run(self) -> None:
            try:
                super().run()
                print("slimllm: extension slimllm._C built")
            except Exception as error:
                if mode == "1":
                    raise
                self.extensions: list[Any] = []
                print(f"slimllm: extension not built, torch does its work ({error})")

    extension = Pybind11Extension(
        "slimllm._C", ["csrc/module.cpp"], cxx_std=17, extra_compile_args=["-Wall", "-Wextra", "-Werror"]
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension_arguments())
