"""The scaling of the rotary embedding that a GGUF file holds as numbers, as the rule by which transformers computes it.

llama.cpp divides each frequency by a factor: one for all of them, a setting, times one of its own, from a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from slimllm.checkpoints.gguf_file import GGUFFile, number_of
from slimllm.errors import InputError

ROPE_FREQS = "rope_freqs.weight"

_TOLERANCE = 1e-5  # relative, of each frequency; fp32 in the file leaves 1e-7
_ORIGINAL, _HIGH = 8192, 4.0  # of all LLaMA 3 that were published

Array = np.ndarray[Any, np.dtype[np.float64]]


def rope_rule(file: GGUFFile, architecture: str, theta: float, head_dim: int) -> dict[str, Any]:
    """The rule that scales the rotary embedding, with its settings under the names of transformers.

    Args:
        file: The model.
        architecture: Before the names of its settings.
        theta: The base of the frequencies.
        head_dim: All of which is rotated.

    Raises:
        ValueError: (as InputError) transformers has no such rule, or this package does not read it; names it.
    """
    if not (math.isfinite(theta) and theta > 0):
        raise InputError(f"{file.path} has {theta} as the base of its rotary embedding, which must be above 0.")
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    divisors = np.full(len(frequencies), _linear_factor(file, f"{architecture}.rope"))
    if ROPE_FREQS in file.entries:
        if file.entries[ROPE_FREQS].shape != divisors.shape:
            raise InputError(f"Tensor {ROPE_FREQS} of {file.path} is not of as many factors as there are frequencies.")
        divisors *= file.read(ROPE_FREQS).double().numpy()
    if not (np.isfinite(divisors).all() and divisors.min() > 0):
        raise InputError(f"{file.path} divides frequencies of its rotary embedding by 0 or less, or by no number.")
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
    """What llama.cpp divides all positions by."""
    kind = file.settings.get(f"{prefix}.scaling.type", "linear")  # a factor without a type counts
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
    """Settings of LLaMA 3's rule to try: the original length, and its parts where the scaling is whole, and where it ends.

    Between these two wavelengths 1/divisor = 1/factor + (1 - 1/factor) (original/wavelength - low) / (high - low), linear
    in 1/wavelength. Only ratios of the three matter, so low is 1.
    """
    yield _ORIGINAL, 1.0, _HIGH
    rise = 1 - 1 / factor
    between = (divisors > 1 + _TOLERANCE) & (divisors < factor * (1 - _TOLERANCE))
    found: list[tuple[float, float]] = []
    if between.sum() >= 2:
        unit = wavelengths[between].min()
        slope, start = np.polyfit(unit / wavelengths[between], 1 / divisors[between], 1)
        if start < 1 / factor:
            high = float(1 + rise / (1 / factor - start))
            found = [(float(slope * unit * (high - 1) / rise), high)]
    else:  # many rules give these numbers, and any of them is right; a narrow ramp fits between two frequencies
        whole = divisors >= factor * (1 - _TOLERANCE)
        first, share = wavelengths[whole].min(), 0.0
        if between.any():
            first, share = wavelengths[between][0], (1 / divisors[between][0] - 1 / factor) / rise
        found = [(float(first * (1 + share * (high - 1))), high) for high in (_HIGH, 2.0, 1.2, 1.02)]
    for original, high in found:
        if original >= 0.5:
            length = round(original)  # transformers wants an integer
            yield length, 1.0, _neat(high)
            yield length, length / original, high * length / original


def _neat(value: float) -> float:
    """A number of few digits, where it differs from one by no more than rounding does."""
    short = round(value, 3)
    return short if abs(short - value) <= 1e-6 * value else value
