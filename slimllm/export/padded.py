"""Export of any model to an architecture of transformers itself: smaller layers are padded with zeros."""

from __future__ import annotations

import dataclasses

from slimllm.checkpoints.source import CheckpointModel
from slimllm.export.base import register_exporter
from slimllm.export.folder import FolderExporter
from slimllm.export.padding import padded_sizes
from slimllm.models.slicing import LayerSizes


@register_exporter("padded")
class Padded(FolderExporter):
    """Writer of a transformers architecture with every layer zero-padded to the largest sizes: exact, but not faster."""

    def padded_sizes(self, source: CheckpointModel) -> LayerSizes | None:
        """Return sizes that hold every layer, with a number of heads that the architecture accepts."""
        wanted = padded_sizes(source.sizes())
        if source.spec.fits_llama(source.config):  # seed_oss accepts any number of heads
            return wanted
        for more in range(source.config.hidden_size):
            kv_heads = wanted.num_kv_heads + more
            if source.spec.takes_heads(source.config, kv_heads * wanted.group_size):
                return dataclasses.replace(wanted, num_kv_heads=kv_heads, num_heads=kv_heads * wanted.group_size)
        return wanted
