"""Triton kernels against fp64: on a GPU, or under the interpreter where there is none."""

from __future__ import annotations

import pytest
import torch
from conftest import needs_kernels
from tolerances import FLOOR, assert_close

from slimllm import ops

triton = pytest.importorskip("triton", minversion="3.6")
from slimllm.kernels import gram as kernel  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [needs_kernels, pytest.mark.usefixtures("poisoned_memory")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "features"), [(1, 1), (63, 129), (129, 63), (200, 64), (64, 200)])
def test_gram(monkeypatch: pytest.MonkeyPatch, tokens: int, features: int, dtype: torch.dtype) -> None:
    monkeypatch.setenv("SLIMLLM_BACKEND", "triton")
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, features, generator=generator).to(DEVICE, dtype)
    gram = torch.randn(features, features, generator=generator)
    gram = (gram + gram.T).to(DEVICE)
    total = torch.randn(features, generator=generator).to(DEVICE)
    wanted_gram, wanted_total = kernel.gram_reference(x)
    wanted_gram, wanted_total = wanted_gram + gram.double(), wanted_total + total.double()
    plain_gram, plain_total = gram + x.float().T @ x.float(), total + x.float().sum(0)
    ops.gram_(gram, total, x)
    assert_close(gram, wanted_gram, plain_gram, FLOOR[torch.float32])
    assert_close(total, wanted_total, plain_total, FLOOR[torch.float32])
    assert torch.equal(gram, gram.T)


def options_case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens whose mean is up to 200 times their spread, it as the pivot, and weights over three decades."""
    generator = torch.Generator().manual_seed(7)
    mean = torch.linspace(-200, 200, 70)
    x = (torch.randn(1100, 70, generator=generator) + mean).to(DEVICE, dtype)
    weight = 10 ** (3 * torch.rand(1100, generator=generator))
    return x, mean.to(DEVICE), weight.to(DEVICE)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("use", ["pivot", "weight", "pivot and weight"])
def test_gram_about_a_pivot_with_weights(
    monkeypatch: pytest.MonkeyPatch, backend: str, dtype: torch.dtype, use: str
) -> None:
    monkeypatch.setenv("SLIMLLM_BACKEND", backend)
    x, mean, weight = options_case(dtype)
    pivot = mean if "pivot" in use else None
    weights = weight if "weight" in use else None
    gram, total = torch.zeros(70, 70, device=DEVICE), torch.zeros(70, dtype=torch.float64, device=DEVICE)
    ops.gram_(gram, total, x, pivot=pivot, weight=weights)
    wanted_gram, wanted_total = kernel.gram_reference(x, pivot, weights)
    u = x.float() - mean if pivot is not None else x.float()
    weighted = u if weights is None else u * weight[:, None]
    size = wanted_gram.diagonal().sqrt()
    # Every entry by its own size. In bf16 the kernel has 16 bits of differences and weighted numbers and leaves out the
    # product of the low parts: three errors of half a unit, or of a whole one where the interpreter cuts off instead.
    scale = torch.outer(size, size)
    unit = 2.0**-16 if DEVICE == "cpu" else 2.0**-18
    floor = 3 * unit if dtype == torch.bfloat16 else FLOOR[torch.float32]
    assert_close(gram / scale, wanted_gram / scale, u.T @ weighted / scale, floor)
    assert_close(total, wanted_total, weighted.sum(0), FLOOR[torch.float32], scale=weighted.abs().sum(0).max())


def test_gram_about_a_far_pivot_in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMLLM_BACKEND", "triton")
    x = torch.tensor([[-6e4, 1.0], [5e4, 2.0]], dtype=torch.float16, device=DEVICE)
    pivot = torch.tensor([3e4, -0.1], device=DEVICE)
    gram, total = torch.zeros(2, 2, device=DEVICE), torch.zeros(2, device=DEVICE)
    ops.gram_(gram, total, x, pivot=pivot)
    assert_close(
        gram, kernel.gram_reference(x, pivot)[0], (x.float() - pivot).T @ (x.float() - pivot), FLOOR[torch.float32]
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU reads by descriptors, or not, as it can")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("splits", [1, 3])
def test_gram_by_tensor_descriptors(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, splits: int) -> None:
    monkeypatch.setattr(kernel, "_can_use_tma", lambda x: True)
    x = torch.randn(200, 144, generator=torch.Generator().manual_seed(0)).to(dtype)[:, :136]
    gram, total = torch.zeros(136, 136), torch.zeros(136, dtype=torch.float64)
    kernel.gram_(gram, total, x, splits=splits)
    wanted_gram, wanted_total = kernel.gram_reference(x)
    assert_close(gram, wanted_gram, x.float().T @ x.float(), FLOOR[torch.float32])
    assert_close(total, wanted_total, x.float().sum(0), FLOOR[torch.float32])


@pytest.mark.skipif(torch.cuda.is_available(), reason="would take 8 GiB of the GPU's memory")
def test_offsets_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tokens that lie 2³⁰ elements apart; the memory between them is never touched."""
    import numpy as np

    monkeypatch.setenv("SLIMLLM_BACKEND", "triton")
    stride = 2**30
    x = torch.from_numpy(np.empty(2 * stride + 70, dtype=np.float16)).as_strided((3, 70), (stride, 1))
    x.copy_(torch.randn(3, 70))
    for dense, strided in ((x.clone(), x), (x.clone()[:, :3].T, x[:, :3].T)):
        results = []
        for tokens in (dense, strided):
            gram, total = torch.zeros(tokens.shape[1], tokens.shape[1]), torch.zeros(tokens.shape[1])
            ops.gram_(gram, total, tokens)
            results.append((gram, total, ops.token_cosine(tokens, tokens * 2)))
        for one, other in zip(*results):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [65, pytest.param(1000, marks=pytest.mark.slow)])
def test_gram_split_over_tokens(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 130, generator=generator).to(DEVICE)
    start = torch.randn(130, 130, generator=generator).to(DEVICE)
    start = start + start.T
    for splits in (2, 3, 7):
        gram, total = start.clone(), torch.ones(130, dtype=torch.float64, device=DEVICE)
        kernel.gram_(gram, total, x, splits=splits)
        wanted_gram, wanted_total = kernel.gram_reference(x)
        assert_close(gram, wanted_gram + start.double(), start + x.T @ x, FLOOR[torch.float32])
        assert_close(total, wanted_total + 1, x.sum(0) + 1, FLOOR[torch.float32], scale=tokens**0.5)
        assert torch.equal(gram, gram.T)


def test_splits_fill_the_chip_and_no_more() -> None:
    assert kernel.choose_splits(num_tiles=3741, num_tokens=4096, processors=132) == 1
    assert kernel.choose_splits(num_tiles=1, num_tokens=100_000, processors=132) > 32
    assert kernel.choose_splits(num_tiles=10, num_tokens=300, processors=132) == 1
    assert kernel.choose_splits(num_tiles=78, num_tokens=4096, processors=132) > 1


def test_every_tile_once() -> None:
    for blocks in (1, 7, 8, 9, 20):
        tiles = kernel._tiles(blocks, torch.device("cpu")).tolist()
        assert sorted(map(tuple, tiles)) == [(row, col) for row in range(blocks) for col in range(row + 1)]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gram_of_strided_input_and_of_nothing(monkeypatch: pytest.MonkeyPatch, backend: str, dtype: torch.dtype) -> None:
    monkeypatch.setenv("SLIMLLM_BACKEND", backend)
    x = torch.randn(80, 150, device=DEVICE).to(dtype).T[::2]
    gram, total = torch.zeros(80, 80, device=DEVICE), torch.zeros(80, dtype=torch.float64, device=DEVICE)
    ops.gram_(gram, total, x)
    ops.gram_(gram, total, x[:0])
    wanted_gram, wanted_total = kernel.gram_reference(x)
    assert_close(gram, wanted_gram, x.float().T @ x.float(), FLOOR[torch.float32])
    assert_close(total, wanted_total, x.float().sum(0), FLOOR[torch.float32])


def test_only_the_addressed_memory_is_written() -> None:
    padded = torch.full((70, 70), torch.nan, device=DEVICE)
    gram = padded[:65, :65]
    gram.zero_()
    totals = torch.full((65, 2), torch.nan, device=DEVICE)
    totals[:, 0] = 0
    x = torch.full((30, 65, 2), torch.nan, device=DEVICE)
    x[..., 1] = torch.randn(30, 65, device=DEVICE)
    for splits in (1, 2):
        gram.zero_(), totals[:, 0].zero_()
        kernel.gram_(gram, totals[:, 0], x[..., 1], splits=splits)
        wanted_gram, wanted_total = kernel.gram_reference(x[..., 1])
        assert_close(gram, wanted_gram, x[..., 1].T @ x[..., 1], FLOOR[torch.float32])
        assert_close(totals[:, 0], wanted_total, x[..., 1].sum(0), FLOOR[torch.float32])
        assert padded[65:].isnan().all() and padded[:, 65:].isnan().all() and totals[:, 1].isnan().all()


def test_gram_errors() -> None:
    gram, total = torch.zeros(3, 3), torch.zeros(3)
    with pytest.raises(ValueError, match="must have shapes"):
        ops.gram_(gram, total, torch.zeros(5, 4))
    with pytest.raises(TypeError, match="float32"):
        ops.gram_(gram.double(), total, torch.zeros(5, 3))
    with pytest.raises(TypeError, match="x must be float32, float16 or bfloat16, got int64"):
        ops.gram_(gram, total, torch.zeros(5, 3, dtype=torch.int64))


def test_the_engine_on_the_kernel(
    monkeypatch: pytest.MonkeyPatch, stories_path: object, token_ids: torch.Tensor, tmp_path: object
) -> None:
    import slimllm

    reports = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("SLIMLLM_BACKEND", backend)
        out = f"{tmp_path}/{backend}"
        reports.append(
            slimllm.prune(str(stories_path), out, slimllm.PruneConfig(0.3, "slimllm", calibration=token_ids[:4]))
        )
        assert reports[-1].backend == backend
    for plain, fused in zip(reports[0].layers, reports[1].layers):
        assert plain["kept_heads"] == fused["kept_heads"] and plain["kept_channels"] == fused["kept_channels"]
