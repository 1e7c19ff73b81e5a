"""Calibration on several texts: what each is called, and how many of the windows it gives."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from slimllm.errors import InputError

BUNDLED = "bundled"  # the name of the bundled text
_SHARE = re.compile(r"0?\.\d+|[01](?:\.0*)?")  # a share after a name that may be a dataset's, with colons of its own


@dataclass(frozen=True)
class Source:
    """One calibration text.

    Attributes:
        name: A file, a dataset, or None for the bundled text.
        share: Its share of the windows; the shares of all texts add up to 1.
    """

    name: str | Path | None
    share: float = 1.0


def sources_of(calibration: str | Path | Sequence[str | Path] | torch.Tensor | None) -> list[Source]:
    """Return the texts of the setting `calibration`, each of the form NAME or NAME:SHARE; token ids have none.

    Without shares, all texts have the same. Shares are relative to their sum.

    Raises:
        ValueError: (as InputError) some texts have a share and others not, a share is not a positive number, or a text is
            given twice.
    """
    if isinstance(calibration, torch.Tensor):
        return []
    if calibration is None:
        return [Source(None)]
    given = [calibration] if isinstance(calibration, (str, Path)) else list(calibration)
    found = [_parsed(text) for text in given]
    shares = [share for _, share in found]
    if None in shares and any(share is not None for share in shares):
        raise InputError(f"Give every calibration text a share, NAME:0.7, or none, got {', '.join(map(str, given))}.")
    names = [name if name is None or not Path(name).exists() else Path(name).resolve() for name, _ in found]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise InputError(f"Calibration text {given[number]} is given twice; give it once, with the sum of its shares.")
    whole = [1.0 if share is None else share for share in shares]
    return [Source(name, share / sum(whole)) for (name, _), share in zip(found, whole)]


def _parsed(text: str | Path) -> tuple[str | Path | None, float | None]:
    """Return the name of a text, None for the bundled one, and its share, if it is given."""
    before, colon, share = str(text).rpartition(":")
    if colon and not Path(text).expanduser().exists():
        known = before == BUNDLED or Path(before).expanduser().exists()
        if known or _SHARE.fullmatch(share):
            return _bundled(before), _positive(share, text)
    return _bundled(text), None


def _bundled(name: str | Path) -> str | Path | None:
    return None if str(name) == BUNDLED and not Path(BUNDLED).exists() else name


def _positive(share: str, text: str | Path) -> float:
    try:
        value = float(share)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InputError(f"The share of a calibration text must be a number above 0, such as NAME:0.7, got {text}.")
    return value


def apportioned(total: int, sources: Sequence[Source]) -> list[int]:
    """Return how many of `total` windows each text gives: its share, rounded so that they add up to the total."""
    exact = [total * source.share for source in sources]
    counts = [int(number + 1e-9) for number in exact]
    rest = sorted(range(len(counts)), key=lambda i: counts[i] - exact[i])
    for i in rest[: total - sum(counts)]:
        counts[i] += 1
    return counts


def mixed(windows: Sequence[torch.Tensor], seed: int) -> torch.Tensor:
    """Return the windows of several texts in an order drawn by `seed`, so that the first ones are of all texts."""
    if len(windows) == 1:
        return windows[0]
    together = torch.cat(list(windows))
    return together[torch.randperm(len(together), generator=torch.Generator().manual_seed(seed))]
