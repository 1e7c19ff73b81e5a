"""Per-feature sums over tokens, from which norms, variances and the affine fit follow without a Gram."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from slimllm.ops.checks import ACTIVATIONS, PRECISE, check_dtype, check_not_overlapping, check_tensors
from slimllm.ops.dispatch import backend_of_call
from slimllm.ops.registry import Random, operator


def column_sums_(
    total: torch.Tensor,
    squares: torch.Tensor,
    x: torch.Tensor,
    *,
    pivot: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> None:
    """Add Σ_t w_t u_t to `total` and Σ_t w_t u_t² to `squares`, with u_t = x_t - pivot, from one read of x.

    Without pivot and weight, the square root of `squares` is ‖X[:, j]‖₂, as in Wanda's metric.

    Args:
        total, squares: (features,) fp32 or fp64.
        x: (num_tokens, features), bf16, fp16 or fp32, any strides.
        pivot: (features,) fp32, subtracted from every token. With a pivot near the mean, the variance
            squares/N - (total/N)² keeps its digits where the mean is far larger than the spread.
        weight: w, (num_tokens,) fp32, not negative; None: 1.

    Raises:
        ValueError: shapes or devices are inconsistent.
        TypeError: a dtype is not one of those above.
    """
    check_tensors(total=total, squares=squares, x=x)
    _check_sums({"total": total, "squares": squares}, x)
    _check_vectors(x, pivot=pivot, weight=weight)
    pivot, weight = (None if vector is None else vector.detach() for vector in (pivot, weight))
    _column_sums_(total.detach(), squares.detach(), x.detach(), pivot, weight)


def column_products_(
    squares: torch.Tensor,
    products: torch.Tensor,
    y: torch.Tensor,
    y_hat: torch.Tensor,
    *,
    pivot_y: torch.Tensor,
    pivot_y_hat: torch.Tensor,
    weight: torch.Tensor | None = None,
) -> None:
    """Add Σ_t w_t v_t² to `squares` and Σ_t w_t u_t v_t to `products`, with u = y - pivot_y and v = ŷ - pivot_ŷ.

    Both come from one read of y and ŷ. With the means as pivots they are N·var(ŷ) and N·cov(y, ŷ), and `affine_fit`
    takes them divided by N.

    Args:
        squares, products: (features,) fp32 or fp64.
        y, y_hat: (num_tokens, features), bf16, fp16 or fp32, any strides.
        pivot_y, pivot_y_hat: (features,) fp32.
        weight: w, (num_tokens,) fp32, not negative; None: 1.

    Raises:
        ValueError: shapes or devices are inconsistent.
        TypeError: a dtype is not one of those above.
    """
    check_tensors(squares=squares, products=products, y=y, y_hat=y_hat, pivot_y=pivot_y, pivot_y_hat=pivot_y_hat)
    _check_sums({"squares": squares, "products": products}, y)
    if y_hat.shape != y.shape:
        raise ValueError(f"y and y_hat must have one shape, got {tuple(y.shape)} and {tuple(y_hat.shape)}.")
    check_dtype("y_hat", y_hat, ACTIVATIONS)
    _check_vectors(y, pivot_y=pivot_y, pivot_y_hat=pivot_y_hat, weight=weight)
    _column_products_(
        squares.detach(),
        products.detach(),
        y.detach(),
        y_hat.detach(),
        pivot_y.detach(),
        pivot_y_hat.detach(),
        None if weight is None else weight.detach(),
    )


def _check_sums(sums: dict[str, torch.Tensor], x: torch.Tensor) -> None:
    for name, tensor in sums.items():
        if x.ndim != 2 or tensor.shape != x.shape[1:]:
            raise ValueError(
                f"{name} must have shape (features,) where the activations have (num_tokens, features), "
                f"got {tuple(tensor.shape)} and {tuple(x.shape)}."
            )
        check_dtype(name, tensor, PRECISE)
        check_not_overlapping(name, tensor)
    (one, first), (other, second) = sums.items()
    if first is second:
        raise ValueError(f"{one} and {other} must be two tensors, got the same for both.")
    check_dtype("the activations", x, ACTIVATIONS)


def _check_vectors(x: torch.Tensor, **vectors: torch.Tensor | None) -> None:
    """Check pivots, with one number for each feature, and weights, with one for each token."""
    for name, vector in vectors.items():
        if vector is not None:
            size = x.shape[0] if name == "weight" else x.shape[1]
            check_tensors(**{"x": x, name: vector})
            check_dtype(name, vector, (torch.float32,))
            if vector.shape != (size,):
                raise ValueError(f"{name} must have shape ({size},), got {tuple(vector.shape)}.")


def _sums_cases(random: Random, tokens: int) -> list[torch.Tensor]:
    x, pivot, results = random(tokens, 192), random(192), []
    for dtype in ACTIVATIONS:
        total, squares = torch.zeros(2, 192, dtype=torch.float64, device=x.device)
        column_sums_(total, squares, x.to(dtype), pivot=pivot)
        results += [total, squares]
    return results


def _products_cases(random: Random, tokens: int) -> list[torch.Tensor]:
    x, pivot, results = random(tokens, 192), random(192), []
    for dtype in ACTIVATIONS:
        squares, products = torch.zeros(2, 192, dtype=torch.float64, device=x.device)
        y = x.to(dtype)
        column_products_(squares, products, y, y.flip(0), pivot_y=pivot, pivot_y_hat=pivot)
        results += [squares, products]
    return results


@operator(
    "column_sums_(Tensor(a!) total, Tensor(b!) squares, Tensor x, Tensor? pivot, Tensor? weight) -> ()",
    shape=lambda *arguments: None,
    cases=_sums_cases,
    kernel=True,
)
def _column_sums_(
    total: torch.Tensor, squares: torch.Tensor, x: torch.Tensor, pivot: torch.Tensor | None, weight: torch.Tensor | None
) -> None:
    if x.numel() == 0:
        return
    if backend_of_call("column_sums_", x.device) == "triton":
        from slimllm.kernels.columns import column_sums as kernel

        pivot, weight = (None if vector is None else vector.contiguous() for vector in (pivot, weight))
        first, second = kernel(x, pivot, None, None, weight)
        total += first
        squares += second
        return
    at_once = _tokens_at_once(x)
    for some, own in zip(x.split(at_once), _parts(weight, at_once, x)):
        u = some.float() if pivot is None else some.float() - pivot
        if own is None:
            total += u.sum(0)
            squares += u.square().sum(0)
        else:
            total += own @ u
            squares += own @ u.square()


def _parts(weight: torch.Tensor | None, at_once: int, x: torch.Tensor) -> Iterable[torch.Tensor | None]:
    return [None] * -(-len(x) // at_once) if weight is None else weight.split(at_once)


def _tokens_at_once(x: torch.Tensor) -> int:
    """Return how many tokens to sum at once: on a CPU, as many as fit the cache, which bounds memory; on a GPU, all."""
    return max(1, 2**18 // x.shape[1]) if x.device.type == "cpu" else len(x)


@operator(
    "column_products_(Tensor(a!) squares, Tensor(b!) products, Tensor y, Tensor y_hat, Tensor pivot_y, "
    "Tensor pivot_y_hat, Tensor? weight) -> ()",
    shape=lambda *arguments: None,
    cases=_products_cases,
    kernel=True,
)
def _column_products_(
    squares: torch.Tensor,
    products: torch.Tensor,
    y: torch.Tensor,
    y_hat: torch.Tensor,
    pivot_y: torch.Tensor,
    pivot_y_hat: torch.Tensor,
    weight: torch.Tensor | None,
) -> None:
    if y.numel() == 0:
        return
    if backend_of_call("column_products_", y.device) == "triton":
        from slimllm.kernels.columns import column_sums as kernel

        weight = None if weight is None else weight.contiguous()
        first, second = kernel(y, pivot_y.contiguous(), y_hat, pivot_y_hat.contiguous(), weight)
        squares += first
        products += second
        return
    at_once = _tokens_at_once(y)
    for some, some_hat, own in zip(y.split(at_once), y_hat.split(at_once), _parts(weight, at_once, y)):
        u, v = some.float() - pivot_y, some_hat.float() - pivot_y_hat
        if own is not None:
            root = own.sqrt()[:, None]
            u, v = u.mul_(root), v.mul_(root)
        products += u.mul_(v).sum(0, dtype=torch.float64)
        squares += v.square_().sum(0, dtype=torch.float64)
