"""Streaming statistics of heads: covariances of their contributions to an output, without the Gram of their inputs."""

from __future__ import annotations

import torch

from slimllm import ops
from slimllm.ops.heads import check_heads
from slimllm.statistics.checks import check_batch, check_mass, check_other
from slimllm.statistics.columns import ColumnStatistics

_ROWS = 256  # rows of a weight that are converted to fp64 at a time


class HeadStatistics(ColumnStatistics):
    """Statistics of every column of a stream x, and covariances of the heads' contributions W_i x_i to W x.

    For a batch b of n_b tokens, `slimllm.ops.head_covariance_of_tokens` gives the covariances C_b about the batch's mean,
    directly from the tokens. With the mean's contribution about the pivot p, μ_b,i = W_i (mean_b - p)_i, (D,) each,

        products[i, j] = Σ_b n_b (C_b[i, j] + μ_b,i μ_b,j),    C[i, j] = products[i, j]/N - μ_i μ_j.

    For few tokens this takes fewer operations than the Gram of x, (H·d, H·d), whose blocks give the same result.
    Products over batches are fp64, those within a batch fp32.

    Args:
        weight: W, (D, H·d), any floating dtype; it must not change while statistics are gathered.
        num_heads: H, which divides the number of inputs of W.

    Raises:
        ValueError: the weight has the wrong shape.
        TypeError: its dtype is not a floating dtype.
    """

    def __init__(self, weight: torch.Tensor, num_heads: int) -> None:
        check_heads(weight, num_heads)
        super().__init__(weight.shape[1], weight.device)
        self.weight, self.num_heads = weight.detach(), num_heads
        self.products = torch.zeros(num_heads, num_heads, len(weight), dtype=torch.float64, device=weight.device)

    def update(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        """Add a batch x (num_tokens, features), any floating dtype. Token weights are not supported."""
        if weight is not None:
            raise ValueError("the statistics of heads take no token weights; use GramStatistics and ops.head_covariance.")
        x = check_batch(x, self.features)
        if x.shape[0] == 0:
            return
        covariance = ops.head_covariance_of_tokens(self.weight, x, self.num_heads, method="stream")
        before = self.total.clone()
        super().update(x)
        mean = self._contributions((self.total - before) / len(x))  # about the pivot, so that no digits are lost
        self.products.add_(covariance, alpha=len(x))
        _add_outer_(self.products, mean, mean, len(x))

    def merge(self, other: ColumnStatistics) -> None:
        """Add the statistics of another part of the stream, of the same weight, in place; the pivots may differ."""
        check_other(self, other, self.features)
        assert isinstance(other, HeadStatistics)
        if other.num_heads != self.num_heads or not torch.equal(other.weight.to(self.weight.device), self.weight):
            raise ValueError("cannot merge statistics of other heads or of another weight.")
        products = other._products_about(self.pivot if self.count else other.pivot)
        super().merge(other)
        self.products += products.to(self.products.device)

    def move(self, pivot: torch.Tensor) -> None:
        """Shift the sums to another pivot, (features,) fp32, in place, so that other sums about it can be added."""
        self.products = self._products_about(pivot)
        super().move(pivot)

    def sums(self) -> list[torch.Tensor]:
        """Return the tensors that add up between statistics about the same pivot."""
        return [*super().sums(), self.products]

    def _products_about(self, pivot: torch.Tensor) -> torch.Tensor:
        total = self._contributions(self.total)
        shift = self._contributions(self.pivot.double() - pivot.to(self.pivot).double())
        products = self.products.clone()
        _add_outer_(products, total, shift, 1.0)
        _add_outer_(products, shift, total, 1.0)
        return _add_outer_(products, shift, shift, self.mass)

    def _contributions(self, x: torch.Tensor) -> torch.Tensor:
        return mean_output(self.weight, x, self.num_heads)

    def head_covariance(self) -> torch.Tensor:
        """Return C of `slimllm.ops.head_covariance`: population covariances, (H, H, D) fp64."""
        check_mass(self.mass)
        mean = self._contributions(self.total / self.mass)
        return _add_outer_(self.products / self.mass, mean, mean, -1.0)


def _add_outer_(products: torch.Tensor, left: torch.Tensor, right: torch.Tensor, factor: float) -> torch.Tensor:
    """Add factor · left_i right_j, from left and right (H, D), to products (H, H, D) without a temporary of that size."""
    for row, one in zip(products, left):
        row.addcmul_(one.expand_as(right), right, value=factor)
    return products


def mean_output(weight: torch.Tensor, mean: torch.Tensor, num_units: int = 1) -> torch.Tensor:
    """Return E W_i x_i over every unit's columns, (num_units, D) fp64, without a copy of the weight in fp64.

    Args:
        weight: W, (D, num_units · d), any floating dtype.
        mean: E x, (num_units · d,) fp64.
    """
    by_unit = mean.view(num_units, -1)
    rows = [(some.double().view(len(some), num_units, -1) * by_unit).sum(-1) for some in weight.split(_ROWS)]
    return torch.cat(rows).T
