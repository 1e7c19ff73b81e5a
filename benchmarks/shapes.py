"""Work of each operation at real shapes: operations and bytes, which bound its time from below."""

from __future__ import annotations

from dataclasses import dataclass

from slimllm.experiments.bench.shapes import SHAPES, Shape

__all__ = ["SHAPES", "Shape"]


@dataclass(frozen=True)
class Work:
    """Unavoidable operations (the halves of a symmetric result count once) and bytes that must be moved once.

    `dtype` gives the rate of the operations: bf16 or tf32x3 on the tensor cores (a product of fp32 numbers takes three of
    TF32), otherwise fp32 or fp64.
    """

    operations: float
    num_bytes: float
    dtype: str

    @property
    def intensity(self) -> float:
        """Return the operations per byte."""
        return self.operations / self.num_bytes

    def floor_s(self, gpu: Gpu) -> tuple[float, float]:
        """Return the seconds for the operations and for the bytes."""
        return self.operations / gpu.rate[self.dtype], self.num_bytes / gpu.bytes_per_s


@dataclass(frozen=True)
class Gpu:
    """Peak rates from a data sheet: dense operations per second by dtype, and bytes per second."""

    name: str
    rate: dict[str, float]
    bytes_per_s: float


# A product of fp32 numbers with fp32's digits takes three TF32 products.
H100 = Gpu("H100 SXM", {"bf16": 989e12, "tf32x3": 495e12 / 3, "fp32": 67e12, "fp64": 34e12}, 3.35e12)
A100 = Gpu("A100 SXM", {"bf16": 312e12, "tf32x3": 156e12 / 3, "fp32": 19.5e12, "fp64": 9.7e12}, 2.04e12)


def gram_work(num_tokens: int, features: int, item: int = 2) -> Work:
    """Count half of the products; x is read once, half of the Gram is read and all of it written."""
    num_bytes = num_tokens * features * item + 6 * features**2
    return Work(num_tokens * features * (features + 1), num_bytes, "bf16" if item == 2 else "tf32x3")


def head_covariance_work(shape: Shape) -> Work:
    """Count the work from half of an fp32 covariance and bf16 weights to fp32 covariances of all units."""
    width, units = shape.attention_width, shape.units
    num_bytes = 2 * width**2 + 2 * shape.hidden_size * width + 4 * units**2 * shape.hidden_size
    return Work(shape.hidden_size * width**2 * (1 + 1 / units), num_bytes, "tf32x3")


def stream_work(shape: Shape, num_tokens: int) -> Work:
    """Count the work from bf16 tokens and weights to fp32 covariances of all units."""
    width, units = shape.attention_width, shape.units
    num_bytes = 2 * (num_tokens + shape.hidden_size) * width + 4 * units**2 * shape.hidden_size
    return Work(num_tokens * shape.hidden_size * (2 * width + units * (units + 1)), num_bytes, "tf32x3")


def exchange_work(shape: Shape, num_pruned: int) -> Work:
    """Count the greedy search on fp32 covariances: each pruned unit reads its row and three (H, D) fp64 arrays."""
    entries = num_pruned * shape.units * shape.hidden_size
    return Work(14 * entries, (4 + 3 * 8) * entries, "fp64")


def columns_work(shape: Shape, num_tokens: int) -> Work:
    """Count sums and squares of one bf16 stream, read once."""
    return Work(4 * num_tokens * shape.intermediate_size, 2 * num_tokens * shape.intermediate_size, "fp32")


def cosine_work(shape: Shape, num_tokens: int) -> Work:
    """Count the cosines of two bf16 streams, read once."""
    return Work(6 * num_tokens * shape.hidden_size, 4 * num_tokens * shape.hidden_size, "fp32")


def half_solve_work(shape: Shape) -> Work:
    """Count the factors of all units' blocks and L⁻¹ of (head_dim, D) in place, in fp32: half of each product is zero."""
    k, m = shape.attention_width // shape.units, shape.hidden_size
    return Work(shape.units * (k**3 / 3 + k**2 * m), 4 * shape.units * (k**2 + 2 * k * m), "fp32")
