"""Scaling of the rotary embedding: conversion of the numbers in a GGUF file to a rule of transformers.

llama.cpp divides each frequency by the product of a common factor, from a setting, and its own factor, from a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from slimllm.checkpoints.gguf_file import GGUFFile, number_of
from slimllm.errors import InputError

ROPE_FREQS = "rope_freqs.weight"

_TOLERANCE = 1e-5  # relative, for each frequency; fp32 in the file has an error of 1e-7
_ORIGINAL, _HIGH = 8192, 4.0  # of all published LLaMA 3 models

Array = np.ndarray[Any, np.dtype[np.float64]]


def rope_rule(file: GGUFFile, architecture: str, theta: float, head_dim: int) -> dict[str, Any]:
    """Return the rule that scales the rotary embedding, with its settings under the names of transformers.

    Args:
        file: The model.
        architecture: Prefix of the names of its settings.
        theta: Base of the frequencies.
        head_dim: Width of a head, all of which is rotated.

    Raises:
        ValueError: (as InputError) transformers has no such rule, or this package does not read it; the message names it.
    """
    if not (math.isfinite(theta) and theta > 0):
        raise InputError(f"{file.path} has {theta} as the base of its rotary embedding, which must be above 0.")
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    divisors = np.full(len(frequencies), _linear_factor(file, f"{architecture}.rope"))
    if ROPE_FREQS in file.entries:
        if file.entries[ROPE_FREQS].shape != divisors.shape:
            raise InputError(f"Tensor {ROPE_FREQS} of {file.path} does not have one factor for each frequency.")
        divisors *= file.read(ROPE_FREQS).double().numpy()
    if not (np.isfinite(divisors).all() and divisors.min() > 0):
        raise InputError(
            f"{file.path} divides frequencies of its rotary embedding by factors that are not finite numbers above 0."
        )
    if np.allclose(divisors, 1, rtol=_TOLERANCE, atol=0):
        return {"rope_type": "default"}
    factor = _neat(float(divisors.max()))
    if np.allclose(divisors, factor, rtol=_TOLERANCE, atol=0):
        return {"rope_type": "linear", "factor": factor}
    wavelengths = 2 * np.pi / frequencies
    for original, low, high in _candidates(divisors, wavelengths, factor):
        share = ((original / wavelengths - low) / (high - low)).clip(0, 1)
        if np.allclose(1 / ((1 - share) / factor + share), divisors, rtol=_TOLERANCE, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise InputError(
        f"{file.path} scales its rotary embedding by factors ({ROPE_FREQS}) that do not follow LLaMA 3's rule; "
        "prune the model's Hugging Face folder instead."
    )


def _linear_factor(file: GGUFFile, prefix: str) -> float:
    """Return the factor by which llama.cpp divides all positions."""
    kind = file.settings.get(f"{prefix}.scaling.type", "linear")  # a factor without a type applies as well
    if any(name.startswith(("rope_factors_long", "rope_factors_short")) for name in file.entries):
        kind = "longrope"
    if kind not in ("none", "linear"):
        raise InputError(
            f"{file.path} scales its rotary embedding by the rule {kind!r}, which is not read from GGUF; "
            "prune the model's Hugging Face folder instead."
        )
    if number_of(file.settings, f"{prefix}.scaling.attn_factor", 1.0, file.path) not in (0.0, 1.0):
        raise InputError(f"{file.path} scales the output of its rotary embedding (attn_factor), which is not supported.")
    old = number_of(file.settings, f"{prefix}.scale_linear", 1.0, file.path)
    factor = number_of(file.settings, f"{prefix}.scaling.factor", old, file.path)
    return 1.0 if kind == "none" else float(factor) or 1.0


def _candidates(divisors: Array, wavelengths: Array, factor: float) -> Iterator[tuple[int, float, float]]:
    """Yield candidate settings of LLaMA 3's rule: the original length, and the low and high frequency factors.

    Wavelengths above original/low are scaled fully, those below original/high not at all. In between,
    1/divisor = 1/factor + (1 - 1/factor) (original/wavelength - low) / (high - low), which is linear in 1/wavelength. Only
    ratios of the three matter, so low is 1.
    """
    yield _ORIGINAL, 1.0, _HIGH
    rise = 1 - 1 / factor
    between = (divisors > 1 + _TOLERANCE) & (divisors < factor * (1 - _TOLERANCE))
    found: list[tuple[float, float]] = []
    if between.sum() >= 2:
        unit = np.min(wavelengths[between])
        slope, start = np.polyfit(unit / wavelengths[between], 1 / divisors[between], 1)
        if start < 1 / factor:
            high = float(1 + rise / (1 / factor - start))
            found = [(float(slope * unit * (high - 1) / rise), high)]
    else:  # many rules give these numbers, and any of them is correct; a narrow ramp fits between two frequencies
        whole = divisors >= factor * (1 - _TOLERANCE)
        first, share = np.min(wavelengths[whole]), 0.0
        if between.any():
            first, share = wavelengths[between][0], (1 / divisors[between][0] - 1 / factor) / rise
        found = [(float(first * (1 + share * (high - 1))), high) for high in (_HIGH, 2.0, 1.2, 1.02)]
    for original, high in found:
        if original >= 0.5:
            length = round(original)  # transformers needs an integer
            yield length, 1.0, _neat(high)
            yield length, length / original, high * length / original


def _neat(value: float) -> float:
    """Round a number to three decimals if that changes it by no more than a rounding error."""
    short = round(value, 3)
    return short if abs(short - value) <= 1e-6 * value else value
