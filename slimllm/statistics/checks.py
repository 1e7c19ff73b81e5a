"""Base class of the accumulators, and checks of their input."""

from __future__ import annotations

import torch


class Accumulator:
    """Base class: number of features, number of tokens seen, and the sum of the tokens' weights (`mass`)."""

    def __init__(self, features: int) -> None:
        if features < 1:
            raise ValueError(f"features must be at least 1, got {features}.")
        self.features = features
        self.count = 0
        self._mass = 0.0
        self._masses: tuple[torch.Tensor, ...] = ()  # of batches; they are added when asked for, so that no batch waits

    @property
    def mass(self) -> float:
        """Sum of the weights of all tokens."""
        if self._masses:
            for mass in torch.stack(self._masses).tolist():
                self._mass += mass
            self._masses = ()
        return self._mass

    @mass.setter
    def mass(self, mass: float) -> None:
        self._mass, self._masses = mass, ()

    def _count(self, num_tokens: int, weight: torch.Tensor | None) -> None:
        self.count += num_tokens
        if weight is None:
            self.mass += num_tokens
        else:
            self._masses += (weight.sum(dtype=torch.float64),)

    def _count_other(self, other: Accumulator) -> None:
        self.count += other.count
        self.mass += other.mass


def check_batch(x: torch.Tensor, features: int, name: str = "x") -> torch.Tensor:
    """Check a batch and return it without its autograd graph, in fp32 unless it is in half precision."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {x.dtype if isinstance(x, torch.Tensor) else type(x)}.")
    if x.ndim != 2 or x.shape[1] != features:
        raise ValueError(f"{name} must have shape (num_tokens, {features}), got {tuple(x.shape)}.")
    return x.detach() if x.dtype in (torch.bfloat16, torch.float16) else x.detach().float()


def check_other(ours: object, other: object, features: int) -> None:
    """Raise TypeError or ValueError if other statistics cannot be merged into ours."""
    if not isinstance(other, type(ours)) and not isinstance(ours, type(other)):
        raise TypeError(f"only another {type(ours).__name__} can be merged, got {type(other).__name__}.")
    if other.features != features:  # type: ignore[attr-defined]
        raise ValueError(f"cannot merge statistics of {other.features} features into {features}.")  # type: ignore[attr-defined]


def check_weight(weight: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """Check the weights of a batch's tokens and return them in fp32."""
    if weight is None:
        return None
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        raise TypeError(
            f"weight must be a floating tensor, got {weight.dtype if isinstance(weight, torch.Tensor) else type(weight)}."
        )
    if weight.shape != x.shape[:1]:
        raise ValueError(f"weight must have shape ({len(x)},), one for each token, got {tuple(weight.shape)}.")
    return weight.detach().to(x.device, torch.float32)


def check_mass(mass: float) -> None:
    """Raise ValueError if the sum of the weights is 0."""
    if mass <= 0:
        raise ValueError("no tokens have been added yet, or none with a weight above 0; call update() first.")


def weighted_mean(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Return the mean over the tokens of a batch, (features,) fp32; unweighted if the weights sum to 0."""
    if weight is None or not float(weight.sum()) > 0:
        return x.mean(0, dtype=torch.float32)
    return (weight / weight.sum()) @ x.float()
