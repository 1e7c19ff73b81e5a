"""Export of pruned models to formats of other programs, with one file per format: `stock`, `padded` and `gguf`."""

from slimllm.export.api import export
from slimllm.export.base import Exporter, ExportJob, register_exporter

__all__ = ["ExportJob", "Exporter", "export", "register_exporter"]
