"""What an exporter is: a form of a model that other programs load."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from slimllm.export.source import ExportSource
from slimllm.plugins import EXPORTERS, Method
from slimllm.runtime.progress import ProgressCallback

register_exporter = EXPORTERS.register


@dataclass(frozen=True)
class ExportJob:
    """One export.

    Attributes:
        source: The model; `weights(index)` reads one layer, `sizes()` has the sizes of all.
        out: The folder or file to make; it must appear when it is complete, and not before.
        overwrite: Whether to replace a model that is there.
        progress: Called with a `PartWritten` after every part; None: nobody.
    """

    source: ExportSource
    out: Path
    overwrite: bool = False
    progress: ProgressCallback | None = None


class Exporter(Method, ABC):
    """Writes a model in one form, without any loss, or not at all.

    Attributes:
        checks_destination: Whether `write` itself sees to it that nothing is overwritten unasked. Otherwise it is not
            called where something is in its place, unless `overwrite` is given.
    """

    checks_destination: ClassVar[bool] = False

    @abstractmethod
    def write(self, job: ExportJob) -> str:
        """Write the model, and return the name of the architecture that was written.

        Raises:
            ValueError: (as InputError) the form cannot hold the model; says which one can. Nothing is written.
        """
