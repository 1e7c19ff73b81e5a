"""What each operation has to do at real shapes: operations and bytes, the floors of its time."""

from __future__ import annotations

from dataclasses import dataclass

from slimllm.experiments.bench.shapes import SHAPES, Shape

__all__ = ["SHAPES", "Shape"]


@dataclass(frozen=True)
class Work:
    """Operations that cannot be avoided (a symmetric result's half counts once) and bytes that must be moved once.

    `dtype` is that of the products on the tensor cores: bf16, tf32 (each product of fp32 numbers is three of those), or
    none.
    """

    operations: float
    num_bytes: float
    dtype: str

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.operations / self.num_bytes

    def floor_s(self, gpu: Gpu) -> tuple[float, float]:
        """Seconds for the operations and for the bytes."""
        return self.operations / gpu.rate[self.dtype], self.num_bytes / gpu.bytes_per_s


@dataclass(frozen=True)
class Gpu:
    """Peaks of a data sheet: dense operations per second by dtype, and bytes per second."""

    name: str
    rate: dict[str, float]
    bytes_per_s: float


# One product of fp32 numbers to fp32's digits takes three of TF32.
H100 = Gpu("H100 SXM", {"bf16": 989e12, "tf32x3": 495e12 / 3, "fp32": 67e12, "fp64": 34e12}, 3.35e12)
A100 = Gpu("A100 SXM", {"bf16": 312e12, "tf32x3": 156e12 / 3, "fp32": 19.5e12, "fp64": 9.7e12}, 2.04e12)


def gram_work(num_tokens: int, features: int, item: int = 2) -> Work:
    """Half of the products; x read once, the Gram's half read and the whole written."""
    num_bytes = num_tokens * features * item + 6 * features**2
    return Work(num_tokens * features * (features + 1), num_bytes, "bf16" if item == 2 else "tf32x3")


def head_covariance_work(shape: Shape) -> Work:
    """From an fp32 covariance (its half) and bf16 weights to fp32 covariances of all units."""
    width, units = shape.attention_width, shape.units
    num_bytes = 2 * width**2 + 2 * shape.hidden_size * width + 4 * units**2 * shape.hidden_size
    return Work(shape.hidden_size * width**2 * (1 + 1 / units), num_bytes, "tf32x3")


def stream_work(shape: Shape, num_tokens: int) -> Work:
    """From bf16 tokens and weights to fp32 covariances of all units."""
    width, units = shape.attention_width, shape.units
    num_bytes = 2 * (num_tokens + shape.hidden_size) * width + 4 * units**2 * shape.hidden_size
    return Work(num_tokens * shape.hidden_size * (2 * width + units * (units + 1)), num_bytes, "tf32x3")


def exchange_work(shape: Shape, num_pruned: int) -> Work:
    """The greedy search on fp32 covariances: every pruned unit's row of them, and three (H, D) arrays in fp64."""
    entries = num_pruned * shape.units * shape.hidden_size
    return Work(14 * entries, (4 + 3 * 8) * entries, "fp64")


def columns_work(shape: Shape, num_tokens: int) -> Work:
    """Sums and squares of one bf16 stream, read once."""
    return Work(4 * num_tokens * shape.intermediate_size, 2 * num_tokens * shape.intermediate_size, "fp32")


def cosine_work(shape: Shape, num_tokens: int) -> Work:
    """Two bf16 streams read once."""
    return Work(6 * num_tokens * shape.hidden_size, 4 * num_tokens * shape.hidden_size, "fp32")
