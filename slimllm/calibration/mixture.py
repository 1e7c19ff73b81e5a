"""Calibration on several texts: what each is called, and how many of the windows it gives."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from slimllm.errors import InputError

BUNDLED = "bundled"  # the name of the bundled text among others
_WITH_SHARE = re.compile(r"(.+):(0?\.\d+|1(?:\.0*)?)")


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
    """Return the texts of the setting `calibration`: one, or several of the form NAME or NAME:SHARE; token ids have none.

    Without shares, all texts have the same. Shares are relative to their sum.

    Raises:
        ValueError: (as InputError) some texts have a share and others not, or a share is 0.
    """
    if isinstance(calibration, torch.Tensor):
        return []
    if calibration is None or isinstance(calibration, (str, Path)):
        return [Source(calibration)]
    names: list[str | Path | None] = []
    shares: list[float | None] = []
    for given in calibration:
        found = None if Path(given).expanduser().exists() else _WITH_SHARE.fullmatch(str(given))
        name = found[1] if found else given
        names.append(None if str(name) == BUNDLED and not Path(BUNDLED).exists() else name)
        shares.append(float(found[2]) if found else None)
    if any(share is None for share in shares) and any(share is not None for share in shares):
        raise InputError(f"Give every calibration text a share, NAME:0.7, or none, got {', '.join(map(str, calibration))}.")
    if 0 in shares:
        raise InputError(f"The share of a calibration text must be more than 0, got {', '.join(map(str, calibration))}.")
    whole = [1.0 if share is None else share for share in shares]
    return [Source(name, share / sum(whole)) for name, share in zip(names, whole)]


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
