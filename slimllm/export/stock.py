"""Export of models whose layers have equal sizes to an architecture of transformers itself."""

from __future__ import annotations

from slimllm.checkpoints.source import CheckpointModel
from slimllm.export.base import register_exporter
from slimllm.export.folder import FolderExporter
from slimllm.models.slicing import LayerSizes


@register_exporter("stock")
class Stock(FolderExporter):
    """Writer of a transformers architecture, for models whose layers have equal sizes (`slimllm prune --uniform`)."""

    def padded_sizes(self, source: CheckpointModel) -> LayerSizes | None:
        return None
