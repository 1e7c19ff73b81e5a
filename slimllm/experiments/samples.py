"""The number of calibration windows that all methods of a comparison get."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from slimllm.calibration import calibration_windows
from slimllm.calibration.windows import SAMPLES
from slimllm.checkpoints.base import Checkpoint
from slimllm.checkpoints.source import CheckpointModel
from slimllm.config import PruneConfig
from slimllm.experiments.methods import config_of
from slimllm.pruning.shapes import samples_for, tokens_to_fit


def with_samples(config: PruneConfig, rows: Iterable[Mapping[str, Any]], checkpoint: Checkpoint) -> PruneConfig:
    """Return the settings with a number of windows: the one given, or the most that one of the methods gets by default.

    Args:
        config: The common settings.
        rows: The settings of each method.
        checkpoint: The model.
    """
    if config.token_ids is not None or config.samples is not None:
        return config
    source = CheckpointModel(checkpoint, torch.device("cpu"), torch.float32)
    tokens = tokens_to_fit(source.sizes(), source.config)
    samples = max(samples_for(config_of(config, row, config.ratio), tokens) for row in rows)
    if samples > SAMPLES:  # the text may have fewer
        logger = logging.getLogger("slimllm")
        logger.disabled = True  # each run says it again
        try:
            samples = len(calibration_windows(config, checkpoint.tokenizer(), source.config, samples).token_ids)
        finally:
            logger.disabled = False
    return dataclasses.replace(config, samples=samples)
