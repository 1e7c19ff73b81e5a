"""The state of structured optimal brain surgery (`slimllm.methods.elimination`): A = H⁻¹ and the refitted weights V."""

from __future__ import annotations

from collections.abc import Callable

import torch

from slimllm import ops
from slimllm.errors import InputError
from slimllm.methods.ridge import RidgeSystem, has_few_tokens
from slimllm.ops import cholesky
from slimllm.ops.dispatch import full_precision
from slimllm.runtime.distributed import Ranks
from slimllm.statistics import GramStatistics

# λ, and λ for few tokens (benchmarks/NOTES.md). Both are smaller than the recovery's. They keep columns that few tokens
# cannot tell apart from looking free to remove.
ELIMINATION_RIDGE, ELIMINATION_RIDGE_OF_FEW = 0.01, 0.3
Solve = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
# Fractions of the mean diagonal, added in turn to a matrix that rounding has made indefinite.
_SHIFTS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
_ROWS = 768  # rows of A that are updated or copied at a time


class Surgeon:
    """The inverse A and the weights V of the remaining columns, on the solver's device of the statistics.

    Columns are scaled to unit size and the ridge bounds the condition number, so fp32 is accurate enough for choosing.
    Memory: A and V, and some of their rows. A takes the place of its system, and what remains of it that of the whole.

    Args:
        weight: W (D, F), any floating dtype.
        statistics: Statistics of its inputs, F features.
        careful: Check every factor at once, which waits for the device, and shift matrices that rounding made indefinite.
            Otherwise `failed` says at the end whether there was one.
        ranks: Processes that share the work, see `SharedSurgeon`.

    Attributes:
        inverse: A, (F, F) fp32; only the lower half is valid.
        weight: Vᵀ, (F, D) fp32; of this process's share of the outputs.
    """

    def __init__(
        self, weight: torch.Tensor, statistics: GramStatistics, careful: bool = False, ranks: Ranks | None = None
    ) -> None:
        self.ranks = ranks or Ranks()
        self._given, self._careful = (weight, statistics), careful
        system = self._regular_system(statistics)
        self.inverse = self._inverse(system)
        size = torch.where(system.scale > 0, system.scale.reciprocal(), 0.0).float()
        own = self.ranks.rows(weight).to(size.device)
        self.weight = own.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        self.weight.mul_(size[:, None])
        self._failures = torch.zeros((), dtype=torch.int64, device=size.device)

    def _regular_system(self, statistics: GramStatistics) -> RidgeSystem:
        ridge = ELIMINATION_RIDGE_OF_FEW if has_few_tokens(statistics) else ELIMINATION_RIDGE
        for shift in _SHIFTS:  # the diagonal is at most 1
            system = RidgeSystem(statistics, None, ridge, torch.float32, shift, self.ranks)
            if not bool(system.failed):
                return system
            del system  # before the next one
        raise _ill_conditioned()

    def _inverse(self, system: RidgeSystem) -> torch.Tensor:
        return system.invert()

    def solved(self, operation: Solve, matrices: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Return the result of `half_solved` or `ops.quadratic_forms` for diagonal blocks of A, (batch, n, n)."""
        if not self._careful:
            result, failed = operation(matrices, right)
            self._failures += failed.count_nonzero()
            return result
        matrices, size = matrices.clone(), matrices.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
        for shift in _SHIFTS:
            matrices.diagonal(dim1=-2, dim2=-1).add_(shift * size)
            result, failed = operation(matrices, right.clone() if operation is half_solved else right)
            if not self._any(failed):
                return result
        raise _ill_conditioned()

    def _any(self, failed: torch.Tensor) -> bool:
        return bool(failed.any())

    def failed(self) -> bool:
        """Return whether a factor could not be computed; what was computed with it is then of no use."""
        return bool(self._failures)

    def again(self) -> Surgeon:
        """Return a careful surgeon of all columns; this one is of no use any more."""
        del self.inverse, self.weight
        return type(self)(*self._given, careful=True, ranks=self.ranks)

    def pivots(self) -> torch.Tensor:
        """Return the diagonal of A, (F,) fp32."""
        return self.inverse.diagonal()

    def squares(self) -> torch.Tensor:
        """Return ‖V_c‖² of every column, (F,) fp32."""
        return self.weight.square().sum(1)

    def products(self, columns: torch.Tensor) -> torch.Tensor:
        """Return V Vᵀ of some columns, by index: (len(columns), len(columns)) fp32."""
        rows = self.weight[columns]
        with full_precision(rows.device):
            return rows @ rows.T

    def agreed(self, chosen: torch.Tensor) -> torch.Tensor:
        """Return the choice that applies to all processes."""
        return chosen

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows of A, by index: (len(rows), F)."""
        below = torch.arange(len(self.inverse), device=rows.device) <= rows[:, None]
        return torch.where(below, self.inverse.index_select(0, rows), self.inverse.index_select(1, rows).T)

    def block(self, columns: torch.Tensor) -> torch.Tensor:
        """Return rows and columns of A, by index: (len(columns), len(columns))."""
        rows = columns[:, None]
        return self.inverse[torch.maximum(rows, columns), torch.minimum(rows, columns)]

    def remove(self, gone: torch.Tensor) -> None:
        """Remove columns and refit the others; the removed ones' entries of A and V become 0, up to rounding.

        Work: n F²/2 + n F D multiply-adds for n columns.
        """
        across = torch.cat([self.rows(gone), self.weight[gone]], 1)
        across = self.solved(half_solved, self.block(gone)[None], across[None])[0]
        inverse, weight = across.split([len(self.weight), self.weight.shape[1]], 1)
        with full_precision(across.device):
            self.weight.addmm_(inverse.T, weight, alpha=-1)
            self._subtract(inverse)

    def _subtract(self, across: torch.Tensor) -> None:
        """Subtract Xᵀ X from A, for X (n, F)."""
        size = len(self.inverse)
        for start in range(0, size, _ROWS):
            stop = min(start + _ROWS, size)
            self.inverse[start:stop, :stop].addmm_(across[:, start:stop].T, across[:, :stop], alpha=-1)

    def keep(self, left: torch.Tensor) -> None:
        """Drop all columns except `left`, in ascending order; the dropped ones must have been removed before."""
        self.weight = self.weight[left]
        size, numbers = len(left), self.inverse.view(-1)
        for start in range(0, size, _ROWS):  # in place: a row moves to where no later one is
            rows = self.inverse[left[start : start + _ROWS]].index_select(1, left)
            numbers[start * size : start * size + rows.numel()] = rows.view(-1)
        self.inverse = numbers[: size * size].view(size, size)


class SharedSurgeon(Surgeon):
    """A surgeon whose work several processes share; all of them call the same methods with the same arguments.

    A process has some rows of A and some outputs of V. The rows and blocks of A that a step needs are put together from
    all, and sums over outputs are added up, so that every process chooses from the same numbers. Removing n columns takes
    n (F² + F D)/R multiply-adds in each of R processes, and sends n F numbers.
    """

    def _inverse(self, system: RidgeSystem) -> torch.Tensor:
        share = self.ranks.share(len(system.matrix))
        self._bounds = [self.ranks.share(len(system.matrix), rank).start for rank in range(self.ranks.size)]
        self._first = share.start
        columns = torch.zeros(len(system.matrix), len(share), device=system.matrix.device)
        columns[share.start : share.stop].fill_diagonal_(1)
        cholesky.solve_(system.matrix, columns, share.start)
        del system.matrix  # before the columns are copied
        return columns.T.contiguous()

    def _any(self, failed: torch.Tensor) -> bool:
        return bool(self._put_together(failed.count_nonzero()))

    def failed(self) -> bool:
        self._put_together(self._failures)
        return super().failed()

    def pivots(self) -> torch.Tensor:
        pivots = torch.zeros(self.inverse.shape[1], device=self.inverse.device)
        pivots[self._first : self._first + len(self.inverse)] = self.inverse.diagonal(self._first)
        return self._put_together(pivots)

    def squares(self) -> torch.Tensor:
        return self._put_together(super().squares())

    def products(self, columns: torch.Tensor) -> torch.Tensor:
        return self._put_together(super().products(columns))

    def agreed(self, chosen: torch.Tensor) -> torch.Tensor:
        return self.ranks.of_first(chosen)

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        return self._put_together(self._own(rows))

    def block(self, columns: torch.Tensor) -> torch.Tensor:
        return self._put_together(self._own(columns).index_select(1, columns))

    def _own(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows of A, by index; those of other processes are 0."""
        if not len(self.inverse):
            return torch.zeros(len(rows), self.inverse.shape[1], device=rows.device)
        at = rows - self._first
        mine = (at >= 0) & (at < len(self.inverse))
        return torch.where(mine[:, None], self.inverse[at.clamp(0, len(self.inverse) - 1)], 0.0)

    def _put_together(self, part: torch.Tensor) -> torch.Tensor:
        self.ranks.sum_(part)
        return part

    def _subtract(self, across: torch.Tensor) -> None:
        own = across[:, self._first : self._first + len(self.inverse)]
        self.inverse.addmm_(own.T, across, alpha=-1)

    def keep(self, left: torch.Tensor) -> None:
        self.weight = self.weight[left]
        bounds = torch.tensor([*self._bounds, self.inverse.shape[1]], device=left.device)
        starts = torch.searchsorted(left, bounds).tolist()
        first, stop = starts[self.ranks.rank], starts[self.ranks.rank + 1]
        self.inverse = self.inverse[left[first:stop] - self._first].index_select(1, left)
        self._first, self._bounds = first, starts[:-1]


def half_solved(matrices: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return R, overwritten by L⁻¹ R, and the mask of `ops.half_solve_`."""
    failed = ops.half_solve_(matrices, right)
    return right, failed


def surgeon_for(weight: torch.Tensor, statistics: GramStatistics, ranks: Ranks | None = None) -> Surgeon:
    """Return a surgeon for an output projection; `ranks` share its work."""
    kind = SharedSurgeon if ranks is not None and ranks.size > 1 else Surgeon
    return kind(weight, statistics, ranks=ranks)


def _ill_conditioned() -> InputError:
    return InputError(
        "The activations are not finite or too ill-conditioned for the criterion obs and the allocation auto; "
        "choose other methods."
    )
