"""The paper's allocation (SlimLLM, arXiv 2505.22689): a softmax over the layers' importances."""

from __future__ import annotations

import math
from dataclasses import dataclass

from slimllm.checks import check_number
from slimllm.errors import InputError
from slimllm.methods.allocation.base import Allocation, Removals, Request, Wanted, enough_windows, register_allocation
from slimllm.methods.allocation.removal import most_removable
from slimllm.methods.allocation.rounding import published_counts, round_shares, softmax_shares

# Published settings for LLaMA-7B, 32 layers: at each ratio, r, n / 32 and alpha.
PAPER_SETTINGS = {0.2: (0.25, 26 / 32, 10.0), 0.5: (0.55, 30 / 32, 7.0)}


@register_allocation("layer-importance")
class LayerImportance(Allocation):
    """The paper's softmax, r_ℓ = r · n · softmax(alpha · c)_ℓ over the n layers of highest similarity c."""

    @dataclass(frozen=True)
    class Settings:
        """Options of the allocation layer-importance.

        Attributes:
            pruned_layers: n, the number of layers to prune (those of highest c); None: by the ratio, as published.
            alpha: Temperature of the softmax; None: by the ratio, as published. 0 is uniform.
            published: Follow the paper: the target is r · n / num_layers, and round(r_ℓ · H) heads and round(r_ℓ · I)
                channels of a layer are removed. With grouped queries, which the paper does not cover, channels make up for
                whole groups. The preset `paper` sets this.
        """

        pruned_layers: int | None = None
        alpha: float | None = None
        published: bool = False

        def __post_init__(self) -> None:
            if self.pruned_layers is not None:
                check_number("layer-importance.pruned_layers", self.pruned_layers, int, 1)
            if self.alpha is not None:
                check_number("layer-importance.alpha", self.alpha, (int, float), 0)

    def check(self, heads_multiple_of: int) -> None:
        if self.settings.published and heads_multiple_of > 1:
            raise InputError(
                f"heads_multiple_of {heads_multiple_of} is not the paper's; leave it out, or choose another preset."
            )

    def wanted(self, ratio: float, num_layers: int) -> Wanted:
        r, n_fraction, paper_alpha = paper_settings(ratio)
        settings = self.settings
        n = settings.pruned_layers if settings.pruned_layers is not None else max(1, round(n_fraction * num_layers))
        alpha = settings.alpha if settings.alpha is not None else paper_alpha
        if n > num_layers:
            raise InputError(f"pruned_layers is {n}, but the model has {num_layers} layers; give at most that.")
        if not settings.published:
            return Wanted(ratio, n, alpha)
        target = r * n / num_layers
        notes = [
            f"as published: r={r:.4g} on n={n} of {num_layers} layers, alpha={alpha:.4g}: "
            f"{target:.2%} of the layers' parameters"
        ]
        if not any(math.isclose(ratio, known) for known in PAPER_SETTINGS):
            how = "interpolated" if min(PAPER_SETTINGS) < ratio < max(PAPER_SETTINGS) else "extrapolated"
            notes.append(f"the paper gives settings for 20 % and 50 %; those for {ratio:.4g} are {how}")
        return Wanted(target, n, alpha, tuple(notes))

    def dense_windows(self, samples: int) -> int:
        return samples if self.settings.published else enough_windows(samples)

    def allocate(self, request: Request) -> Removals:
        shapes, similarity, n = list(request.shapes), list(request.similarity), request.wanted.pruned_layers
        most = [most_removable(shape, request.round_to) for shape in shapes]
        chosen = sorted(range(len(shapes)), key=lambda i: (-similarity[i], i))
        while sum(most[i] for i in chosen[:n]) < request.target:
            n += 1
        notes = []
        if n > request.wanted.pruned_layers:
            notes.append(f"{request.wanted.pruned_layers} layers cannot give so much, so {n} are pruned")
        shares = softmax_shares(similarity, shapes, most, chosen[:n], request.wanted.alpha, request.target)
        if self.settings.published and not any(shape.grouped for shape in shapes):
            return Removals(published_counts(shares, shapes), n, notes)
        return Removals(round_shares(shares, shapes, request.target, request.round_to), n, notes)


def paper_settings(ratio: float) -> tuple[float, float, float]:
    """Return the published (r, n / num_layers, alpha) at a ratio.

    They are linear between 20 % and 50 %. Outside, n and alpha are constant and r is proportional to the ratio.
    """
    low, high = min(PAPER_SETTINGS), max(PAPER_SETTINGS)
    nearest = min(max(ratio, low), high)
    weight = (nearest - low) / (high - low)
    r, n_fraction, alpha = ((1 - weight) * a + weight * b for a, b in zip(PAPER_SETTINGS[low], PAPER_SETTINGS[high]))
    return r * ratio / nearest, n_fraction, alpha
