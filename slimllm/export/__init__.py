"""Pruned models in formats of others, one file for each: a stock architecture, padded, or GGUF."""

from slimllm.export.api import export
from slimllm.export.base import Exporter, ExportJob, register_exporter

__all__ = ["ExportJob", "Exporter", "export", "register_exporter"]
