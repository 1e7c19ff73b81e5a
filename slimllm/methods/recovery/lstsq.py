"""Least squares: a ridge regression on the kept columns refits all of their weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from slimllm.errors import InputError
from slimllm.methods.moments import kept_and_removed, relative_error
from slimllm.methods.recovery.base import Fit, Recovery, register_recovery
from slimllm.methods.ridge import RidgeSystem, has_few_tokens, not_finite
from slimllm.methods.statistics import Needs, SublayerStatistics
from slimllm.models.slicing import OutputChange
from slimllm.models.sublayer import Sublayer
from slimllm.runtime.distributed import Ranks
from slimllm.runtime.precision import has_slow_fp64
from slimllm.statistics import GramStatistics

# λ for columns scaled to unit size, and λ for few tokens (benchmarks/NOTES.md).
RIDGE, RIDGE_OF_FEW = 0.3, 1.0
# Outputs that are fitted at a time, and rows of the covariance that are read at a time.
OUTPUTS, ROWS = 2048, 1024


@register_recovery("lstsq")
class LeastSquares(Recovery):
    """Ridge regression of all kept weights of an output projection, for a result closer to the dense model."""

    version = "2"  # by panels
    needs = Needs.COLUMN_GRAM
    shares_work = True
    goes_without_bias = True

    @dataclass(frozen=True)
    class Settings:
        """Options of the recovery lstsq.

        Attributes:
            precision: Dtype of the factor: `double`, `single` with refinement in fp64, or `auto`, which is `double` except
                on GPUs with slow fp64.
        """

        precision: str = "auto"

        def __post_init__(self) -> None:
            if self.precision not in ("auto", "double", "single"):
                raise InputError(f"lstsq.precision must be auto, double or single, got {self.precision!r}.")

    def fit(self, sublayer: Sublayer, statistics: SublayerStatistics, kept: torch.Tensor) -> Fit:
        weight, precision = sublayer.output_projection.weight, self.settings.precision
        single = has_slow_fp64(statistics.gram.solver) if precision == "auto" else precision == "single"
        single = statistics.ranks.tell(single)  # the processes share the factor
        dtype = torch.float32 if single else torch.float64
        gram = statistics.gram if sublayer.takes_bias else statistics.gram.about_zero()
        refit = refit_kept(weight, gram, sublayer.columns_of(kept), statistics.ranks, dtype)
        variance = statistics.output_variance()
        change = refit.change if sublayer.takes_bias else replace(refit.change, intercept=None)
        return Fit(change, relative_error(refit.before, variance), relative_error(refit.after, variance))


@dataclass(frozen=True)
class Refit:
    """A change of the kept columns' weights, and the output error Σ_k E(e_k)² before and after it."""

    change: OutputChange
    before: float
    after: float


def refit_kept(
    weight: torch.Tensor,
    statistics: GramStatistics,
    keep: torch.Tensor,
    ranks: Ranks | None = None,
    dtype: torch.dtype = torch.float64,
) -> Refit:
    """Change the kept columns' weights so that they best make up for the removed columns, from the Gram of all columns.

    With R the removed columns and S the kept ones, e = W_R z_R is the output that pruning removes:

        Cov(z_S, e) = Ĝ_SR W_Rᵀ,   E e = W_R E z_R,   var(e_k) = (W_R Ĝ_RR W_Rᵀ)_kk.

    A ridge regression of e on the kept inputs z,

        Δᵀ = D⁻¹ (D⁻¹ Cov(z) D⁻¹ + λI)⁻¹ D⁻¹ Cov(z, e),   D² = diag Cov(z) + 0.01 (E z)²,   b = E e - Δ E z,

    shrinks the new weights towards the old ones, relative to the size of each column. Few tokens, even fewer than columns,
    therefore do no harm.

    Args:
        weight: W of the output projection, (D, F).
        statistics: Statistics of its inputs z, F features; everything is computed on their solver's device.
        keep: Indices of the kept columns, on any device.
        ranks: Processes with the same statistics, each of which computes its share of the outputs; None: this process only.
        dtype: fp64 or fp32, of the system's factor; see `RidgeSystem`.

    Raises:
        ValueError: (as InputError) the statistics are not finite.
    """
    ranks = ranks or Ranks()
    outputs, solver = len(weight), statistics.solver
    kept, removed = kept_and_removed(keep, statistics.mean())
    mean_kept, mean_removed = (statistics.mean()[columns].to(solver) for columns in (kept, removed))
    system = RidgeSystem(statistics, kept, RIDGE_OF_FEW if has_few_tokens(statistics) else RIDGE, dtype, ranks=ranks)
    system.check()
    weight = ranks.rows(weight).to(solver)
    delta = torch.empty(len(weight), len(kept), dtype=torch.float64, device=solver)
    intercept = torch.empty(len(weight), dtype=torch.float64, device=solver)
    errors = torch.zeros(2, dtype=torch.float64, device=solver)
    for start in range(0, len(weight), OUTPUTS):
        some = slice(start, start + OUTPUTS)
        of_removed = weight[some][:, removed.to(solver)].double()
        mean_lost = of_removed @ mean_removed
        lost = torch.zeros_like(mean_lost)
        for at, rows in _parts(removed):
            lost += ((of_removed @ statistics.block(rows, removed).T) * of_removed[:, at]).sum(1)
        across = torch.empty(len(kept), len(mean_lost), dtype=torch.float64, device=solver)
        for at, rows in _parts(kept):
            torch.matmul(statistics.block(rows, removed), of_removed.T, out=across[at])
        across.mul_(system.scale[:, None])
        scaled = system.solve(across)
        # As (correlation + λI) scaled = across, tr(Δ Cov(z) Δᵀ) is tr(scaledᵀ across) - λ‖scaled‖².
        missing = lost.sum() - (scaled * across).sum() - system.ridge * scaled.square().sum()
        torch.mul(scaled.T, system.scale, out=delta[some])
        intercept[some] = mean_lost - delta[some] @ mean_kept
        errors += torch.stack([lost.sum() + mean_lost.square().sum(), missing])
    del system
    whole = OutputChange(ranks.join(intercept, outputs), delta=ranks.join(delta, outputs))
    ranks.sum_(errors)
    if not bool(errors.isfinite().all()):
        raise not_finite()
    before, after = errors.clamp(min=0).tolist()
    return Refit(whole, before, after)


def _parts(columns: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    for start in range(0, len(columns), ROWS):
        yield slice(start, start + ROWS), columns[start : start + ROWS]
