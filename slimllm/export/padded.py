"""Models of any layer sizes as an architecture of transformers itself: smaller layers are padded by zeros."""

from __future__ import annotations

import dataclasses

from slimllm.checkpoints.source import CheckpointModel
from slimllm.export.base import register_exporter
from slimllm.export.folder import FolderExporter
from slimllm.export.padding import padded_sizes
from slimllm.models.slicing import LayerSizes


@register_exporter("padded")
class Padded(FolderExporter):
    """Transformers' own architecture, every layer brought to the sizes of the largest by zeros: exact, and no faster."""

    def padded_sizes(self, source: CheckpointModel) -> LayerSizes | None:
        """Sizes that hold every layer, with as many heads as the architecture asks for."""
        wanted = padded_sizes(source.sizes())
        if source.spec.fits_llama(source.config):  # seed_oss takes any number
            return wanted
        for more in range(source.config.hidden_size):
            kv_heads = wanted.num_kv_heads + more
            if source.spec.takes_heads(source.config, kv_heads * wanted.group_size):
                return dataclasses.replace(wanted, num_kv_heads=kv_heads, num_heads=kv_heads * wanted.group_size)
        return wanted
