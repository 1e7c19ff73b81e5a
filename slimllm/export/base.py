"""Base class of exporters, each of which writes one format that other programs load."""

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
    """Arguments of one export.

    Attributes:
        source: The model; `weights(index)` reads one layer, `sizes()` returns the sizes of all layers.
        out: The folder or file to write; it must not appear before it is complete.
        overwrite: Whether to replace an existing model.
        progress: Called with a `PartWritten` after every part; None: no callback.
    """

    source: ExportSource
    out: Path
    overwrite: bool = False
    progress: ProgressCallback | None = None


class Exporter(Method, ABC):
    """Writer of models in one format, which either loses nothing or refuses the model.

    Attributes:
        checks_destination: Whether `write` itself refuses to overwrite without `overwrite`. If not, it is called only if
            `out` does not exist or `overwrite` is given.
    """

    checks_destination: ClassVar[bool] = False

    @abstractmethod
    def write(self, job: ExportJob) -> str:
        """Write the model, and return the name of the architecture that was written.

        Raises:
            ValueError: (as InputError) the format cannot hold the model; the message says which one can. Nothing is
                written.
        """
