"""Triton kernels against fp64: on a GPU, or under the interpreter where there is none."""

from __future__ import annotations

import pytest
import torch
from tolerances import FLOOR, assert_close

from slimllm import ops

triton = pytest.importorskip("triton")
from slimllm.kernels import gram as kernel  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
    """Tokens whose mean is up to 200 times their spread, a pivot that suits them, and weights over three decades."""
    generator = torch.Generator().manual_seed(7)
    mean = torch.linspace(-200, 200, 70).to(dtype).float()
    x = (torch.randn(1100, 70, generator=generator) + mean).to(DEVICE, dtype)
    weight = 10 ** (3 * torch.rand(1100, generator=generator))
    # Where the mean is below a few times the spread, differences would be rounded, and there is nothing to gain.
    return x, torch.where(mean.abs() > 16, mean, 0).to(DEVICE), weight.to(DEVICE)


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
    assert_close(gram, wanted_gram, u.T @ weighted, FLOOR[torch.float32] if dtype == torch.float32 else 2e-5)
    size = wanted_gram.diagonal().sqrt().max() * len(x) ** 0.5  # of the sum of |u|, which bounds that of u
    assert_close(total, wanted_total, weighted.sum(0), FLOOR[torch.float32], scale=size)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("tokens", [65, 1000])
def test_gram_split_over_tokens(tokens: int, deterministic: bool) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 130, generator=generator).to(DEVICE)
    start = torch.randn(130, 130, generator=generator).to(DEVICE)
    start = start + start.T
    for splits in (2, 3, 7):
        gram, total = start.clone(), torch.ones(130, dtype=torch.float64, device=DEVICE)
        kernel.gram_(gram, total, x, deterministic=deterministic, splits=splits)
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
def test_gram_of_strided_input_and_of_nothing(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setenv("SLIMLLM_BACKEND", backend)
    x = torch.randn(80, 150, device=DEVICE).T[::2]
    gram, total = torch.zeros(80, 80, device=DEVICE), torch.zeros(80, dtype=torch.float64, device=DEVICE)
    ops.gram_(gram, total, x)
    ops.gram_(gram, total, x[:0])
    wanted_gram, wanted_total = kernel.gram_reference(x)
    assert_close(gram, wanted_gram, x.T @ x, FLOOR[torch.float32])
    assert_close(total, wanted_total, x.sum(0), FLOOR[torch.float32])


def test_only_the_addressed_memory_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMLLM_BACKEND", "triton")
    padded = torch.full((70, 70), torch.nan, device=DEVICE)
    gram = padded[:65, :65]
    gram.zero_()
    ops.gram_(gram, torch.zeros(65, device=DEVICE), torch.randn(30, 65, device=DEVICE))
    assert not gram.isnan().any()
    assert padded[65:].isnan().all() and padded[:, 65:].isnan().all()


def test_gram_errors() -> None:
    gram, total = torch.zeros(3, 3), torch.zeros(3)
    with pytest.raises(ValueError, match="must have shapes"):
        ops.gram_(gram, total, torch.zeros(5, 4))
    with pytest.raises(TypeError, match="float32"):
        ops.gram_(gram.double(), total, torch.zeros(5, 3))
    with pytest.raises(TypeError, match="x float32"):
        ops.gram_(gram, total, torch.zeros(5, 3, dtype=torch.int64))


def test_the_engine_on_the_kernel(
    monkeypatch: pytest.MonkeyPatch, stories_path: object, token_ids: torch.Tensor, tmp_path: object
) -> None:
    import slimllm

    reports = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("SLIMLLM_BACKEND", backend)
        out = f"{tmp_path}/{backend}"
        reports.append(slimllm.prune(str(stories_path), out, slimllm.PruneConfig(ratio=0.3, calibration=token_ids)))
        assert reports[-1].backend == backend
    for plain, fused in zip(reports[0].layers, reports[1].layers):
        assert plain["kept_heads"] == fused["kept_heads"] and plain["kept_channels"] == fused["kept_channels"]
