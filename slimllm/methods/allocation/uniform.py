"""Every layer gives the same share."""

from __future__ import annotations

from slimllm.methods.allocation.base import Allocation, Budgets, Request, register_allocation
from slimllm.methods.allocation.budget import most_removable
from slimllm.methods.allocation.rounding import round_budgets, softmax_budgets


@register_allocation("uniform")
class Uniform(Allocation):
    """The same share of every layer, to the last channel where they are alike, so that the result can be a stock model."""

    alike = True

    def allocate(self, request: Request) -> Budgets:
        shapes, everyone = list(request.shapes), list(range(len(request.shapes)))
        most = [most_removable(shape, request.round_to) for shape in shapes]
        order = sorted(everyone, key=lambda i: (-request.similarity[i], i))
        budgets = softmax_budgets(list(request.similarity), shapes, most, order, 0.0, request.target)
        if all(shape == shapes[0] for shape in shapes):
            same = round_budgets(budgets[:1], shapes[:1], round(budgets[0]), request.round_to)
            return Budgets(same * len(shapes), len(shapes))
        return Budgets(round_budgets(budgets, shapes, request.target, request.round_to), len(shapes))
