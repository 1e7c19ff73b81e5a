"""Ridge regressions on the columns of a Gram: their scale, their system, and its solution."""

from __future__ import annotations

import torch

from slimllm.errors import InputError
from slimllm.ops import cholesky
from slimllm.runtime.distributed import Ranks
from slimllm.statistics import GramStatistics

# Fraction of a column's squared mean that is added to its variance. It bounds the weights of a nearly constant column,
# which could otherwise be so large that rounding them moves the output.
MEAN_PART = 0.01
# Rows of a system that are made at a time.
_ROWS = 256
# Largest residual of a solution in fp32, as a fraction of the right-hand side, that one refinement makes up for.
LARGEST_RESIDUAL = 1e-4


def has_few_tokens(statistics: GramStatistics) -> bool:
    """Return whether there are fewer than two tokens per column; a fit of all columns then describes only these tokens."""
    return statistics.count < 2 * statistics.features


def column_scale(variance: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Compute the size d of every column for the ridge, (F,) fp64: d² = var z + 0.01 (E z)², and 0 if it is constant."""
    variance = variance.clamp(min=0)
    return torch.where(variance > 0, (variance + MEAN_PART * mean.square()).sqrt(), 0.0)


class RidgeSystem:
    """S = D⁻¹ Cov(z) D⁻¹ + λI of some columns z of a Gram, D² from `column_scale`, with its Cholesky factor in its place.

    The correlations are positive semidefinite and have at most 1 on the diagonal. The eigenvalues of S are therefore
    between λ and λ + k, and its condition number is at most 1 + k/λ, whatever the columns: 6·10⁴ for 17,920 columns and
    the recovery's λ = 0.3, so that S is not singular to fp32's precision. A factor in fp32, with a residual in fp64, solves
    it. With the elimination's λ = 0.01 the bound is 2·10⁶: S can be indefinite in fp32, and `failed` says so.

    All of it is on the Gram's `solver`; the Gram may be elsewhere. Memory: one matrix of the dtype, and some rows.

    Args:
        statistics: Statistics of the columns.
        columns: Indices of the columns, (k,), on the device of the Gram; None: all of them.
        ridge: λ, positive.
        dtype: fp32 or fp64.
        shift: Added to the diagonal once more, for a system that rounding has made indefinite.
        ranks: Processes with the same statistics that share the work of the factor; all of them have all of it.

    Attributes:
        scale: 1/D, (k,) fp64; 0 for a constant column.
        matrix: L, lower half, until `invert`.
        failed: Whether S is not positive definite, a scalar bool tensor.
    """

    def __init__(
        self,
        statistics: GramStatistics,
        columns: torch.Tensor | None,
        ridge: float,
        dtype: torch.dtype = torch.float64,
        shift: float = 0.0,
        ranks: Ranks | None = None,
    ) -> None:
        self.statistics, self.columns, self.ridge, self.dtype = statistics, columns, ridge, dtype
        size = column_scale(statistics.variance(), statistics.mean())
        size = (size if columns is None else size[columns]).to(statistics.solver)
        self.scale = torch.where(size > 0, size.reciprocal(), 0.0)
        self._factorise(shift, ranks)

    def _factorise(self, shift: float = 0.0, ranks: Ranks | None = None) -> None:
        size, device = len(self.scale), self.scale.device
        self.matrix = torch.empty(0)  # frees that of another dtype
        self.matrix = torch.empty(size, size, dtype=self.dtype, device=device)
        for start in range(0, size, _ROWS):
            rows = slice(start, start + _ROWS)
            self.matrix[rows] = self._correlations(rows)
        self.matrix.diagonal().add_(self.ridge + shift)
        self.failed = cholesky.factorise_(self.matrix, ranks)

    def _correlations(self, rows: slice) -> torch.Tensor:
        """Return rows of D⁻¹ Cov(z) D⁻¹, fp64."""
        if self.columns is None:
            covariance = self.statistics.rows(rows)
        else:
            covariance = self.statistics.block(self.columns[rows], self.columns)
        return covariance.mul_(self.scale[rows, None]).mul_(self.scale)

    def invert(self) -> torch.Tensor:
        """Return the lower half of S⁻¹, (k, k) of the dtype, in place of the factor; the upper half is of no use."""
        return cholesky.invert_(self.matrix)

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        """Return S⁻¹ R, (k, m) fp64.

        In fp32, the residual r = R - S X of the first solution X is computed in fp64, and S⁻¹ r is added. If ρ is ‖r‖/‖R‖,
        this leaves a residual of about ρ‖r‖, so an error of at most ρ²‖R‖/λ, and ρ²(1 + k/λ) relative to the solution. If
        ρ is more than 10⁻⁴, or S has no factor in fp32, it is factored again in fp64.

        Args:
            right: R, (k, m) fp64, on the solver's device.

        Raises:
            ValueError: (as InputError) the system is not positive definite, or not finite.
        """
        if self.dtype == torch.float32:
            if not bool(self.failed) and (solution := self._refined(right)) is not None:
                return solution
            self.dtype = torch.float64
            self._factorise()
        self.check()
        return cholesky.solve_(self.matrix, right.clone())

    def _refined(self, right: torch.Tensor) -> torch.Tensor | None:
        """Return the solution by a factor in fp32; None: it is not accurate enough."""
        solution = cholesky.solve_(self.matrix, right.float()).double()
        residual = right - self.ridge * solution
        for start in range(0, len(residual), _ROWS):
            rows = slice(start, start + _ROWS)
            residual[rows] -= self._correlations(rows) @ solution
        if not bool(residual.norm() <= LARGEST_RESIDUAL * right.norm()):  # also for NaN
            return None
        return solution.add_(cholesky.solve_(self.matrix, residual.float()))

    def check(self) -> None:
        """Raise InputError if a system in fp64 is not positive definite; one in fp32 may be by `solve`."""
        if self.dtype == torch.float64 and bool(self.failed):
            raise not_finite()


def not_finite() -> InputError:
    """Return the error of statistics that are not finite."""
    return InputError(
        "The activations are not finite, or so large that their products are not; give --compute-dtype float32 or other "
        "calibration text."
    )
