"""The uniform allocation: every layer loses the same share."""

from __future__ import annotations

from slimllm.methods.allocation.base import Allocation, Removals, Request, enough_windows, register_allocation
from slimllm.methods.allocation.removal import most_removable
from slimllm.methods.allocation.rounding import round_shares, softmax_shares


@register_allocation("uniform")
class Uniform(Allocation):
    """The same share for every layer; layers of equal sizes lose exactly the same, so the result can be a stock model."""

    alike = True

    def dense_windows(self, samples: int) -> int:
        return enough_windows(samples)

    def allocate(self, request: Request) -> Removals:
        shapes, everyone = list(request.shapes), list(range(len(request.shapes)))
        most = [most_removable(shape, request.round_to) for shape in shapes]
        order = sorted(everyone, key=lambda i: (-request.similarity[i], i))
        shares = softmax_shares(list(request.similarity), shapes, most, order, 0.0, request.target)
        if all(shape == shapes[0] for shape in shapes):
            same = round_shares(shares[:1], shapes[:1], round(shares[0]), request.round_to)
            return Removals(same * len(shapes), len(shapes))
        return Removals(round_shares(shares, shapes, request.target, request.round_to), len(shapes))
