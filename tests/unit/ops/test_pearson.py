from __future__ import annotations

import pytest
import torch
from conftest import needs_kernels
from tolerances import FLOOR, assert_close

pytest.importorskip("triton", minversion="3.6")

from slimllm import ops
from slimllm.kernels import cosine, exchange, pearson
from slimllm.ops import heads
from slimllm.ops.pearson import ROUNDING

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("poisoned_memory")
# heads, width, outputs, tokens: a single head, odd sizes, more heads than a block has, wide units
SHAPES = [(1, 8, 5, 3), (3, 24, 65, 20), (9, 40, 18, 15), (17, 16, 10, 33), (2, 130, 16, 17)]


def case(
    heads: int, width: int, outputs: int, tokens: int, dtype: torch.dtype, mean: float = 0.0
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(heads)
    features = heads * width
    x = (
        torch.randn(tokens, features, generator=generator)
        @ torch.randn(features, features, generator=generator)
        / features**0.5
    )
    x = x + mean * torch.randn(features, generator=generator)
    weight = torch.randn(outputs, features, generator=generator)
    return weight.to(DEVICE), x.to(dtype).to(DEVICE)


@pytest.fixture(params=["torch", pytest.param("triton", marks=needs_kernels)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SLIMLLM_BACKEND", request.param)
    return request.param


def plain_in_fp32(weight: torch.Tensor, x: torch.Tensor, heads: int) -> torch.Tensor:
    """The straightforward computation, in fp32."""
    u = x.float() - x.float().mean(0)
    contributions = torch.einsum("nhd,khd->hkn", u.view(len(x), heads, -1), weight.float().view(len(weight), heads, -1))
    return torch.einsum("ikn,jkn->ijk", contributions, contributions) / len(x)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.float32) for shape in SHAPES), *((SHAPES[1], dtype) for dtype in (torch.float16, torch.bfloat16))],
)
def test_covariances_of_heads_both_ways(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    heads = shape[0]
    weight, x = case(*shape, dtype)
    wanted = pearson.head_covariance_reference(weight, x, heads)
    plain = plain_in_fp32(weight, x, heads)
    u = x.double() - x.double().mean(0)
    results = {
        "gram, fp64": ops.head_covariance(weight, u.T @ u / len(x), heads),
        "gram, fp32": ops.head_covariance(weight, (u.T @ u / len(x)).float(), heads),
        "tokens, stream": ops.head_covariance_of_tokens(weight, x, heads, method="stream"),
        "tokens, gram": ops.head_covariance_of_tokens(weight, x, heads, method="gram"),
    }
    for name, got in results.items():
        assert got.dtype == (torch.float64 if name == "gram, fp64" else torch.float32)
        assert_close(got, wanted, plain, FLOOR[torch.float32])
        assert torch.equal(got, got.transpose(0, 1)), name


def test_weights_in_half_precision_and_strided_inputs(backend: str) -> None:
    weight, x = case(4, 16, 40, 30, torch.float32)
    weight, x = weight.bfloat16().T.contiguous().T, x.T.contiguous().T
    wanted, plain = pearson.head_covariance_reference(weight, x, 4), plain_in_fp32(weight, x, 4)
    for method in ("stream", "gram"):
        assert_close(ops.head_covariance_of_tokens(weight, x, 4, method=method), wanted, plain, FLOOR[torch.float32])


def test_means_far_larger_than_spreads(backend: str) -> None:
    weight, x = case(4, 16, 40, 300, torch.float32, mean=1e4)
    wanted, plain = pearson.head_covariance_reference(weight, x, 4), plain_in_fp32(weight, x, 4)
    for method in ("stream", "gram"):
        assert_close(ops.head_covariance_of_tokens(weight, x, 4, method=method), wanted, plain, 1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would take 8 GiB of the GPU's memory")
def test_offsets_beyond_32_bits(backend: str) -> None:
    """A weight whose columns lie 2³⁰ elements apart, and one whose rows do; the memory between is never touched."""
    import numpy as np

    weight, x = case(2, 2, 4, 10, torch.float32)
    memory = np.empty(3 * 2**30 + 4, dtype=np.float16)
    for strides in ((1, 2**30), (2**30, 1)):
        far = torch.from_numpy(memory).as_strided((4, 4), strides)
        far.copy_(weight)
        near, u = far.clone(memory_format=torch.contiguous_format), x.double() - x.double().mean(0)
        wanted, plain = pearson.head_covariance_reference(near, x, 2), plain_in_fp32(near, x, 2)
        for got in (
            ops.head_covariance(far, u.T @ u / len(x), 2),
            ops.head_covariance_of_tokens(far, x, 2, method="stream"),
        ):
            assert_close(got, wanted, plain, FLOOR[torch.float32])


def test_one_token_and_a_dead_head(backend: str) -> None:
    weight, x = case(3, 8, 10, 1, torch.float32)
    for method in ("stream", "gram"):
        assert not ops.head_covariance_of_tokens(weight, x, 3, method=method).any()
    weight, x = case(3, 8, 10, 20, torch.float32)
    weight[:, 8:16] = 0
    got = ops.head_covariance_of_tokens(weight, x, 3, method="stream")
    assert not got[1].any() and not got[:, 1].any() and got[0, 0].all()


@pytest.mark.parametrize(
    ("num_heads", "outputs", "inputs", "fused", "most"),
    [
        (32, 4096, 4096, False, 1567),  # LLaMA-7B
        (32, 4096, 4096, True, 1221),  # where blocks of heads are made anew
        (8, 8192, 8192, True, 3008),  # LLaMA-2-70B, whose eight units fill half of a block
        (3, 576, 576, True, 72),
    ],
)
def test_the_cheaper_way(num_heads: int, outputs: int, inputs: int, fused: bool, most: int) -> None:
    """Streaming for few tokens only; all operations counted one by one."""
    width, block = inputs // num_heads, 16 if fused else 1
    blocks = -(-num_heads // block)
    per_token = sum(
        (2 if row > col else 1) * block * (-(-width // 16) * 16 if fused else width) if fused or row == col else 0
        for row in range(blocks)
        for col in range(row + 1)
    )
    per_token += sum(block**2 if fused else (0.5 if row == col else 1) for row in range(blocks) for col in range(row + 1))
    by_pairs = sum(width**2 for row in range(num_heads) for col in range(row + 1))

    def stream_is_cheaper(tokens: int) -> bool:
        rate = 1 if fused else 1.5  # torch streams at two thirds of the rate of a large product
        result = outputs * num_heads**2 * (200 if fused else 1000)
        return rate * tokens * outputs * per_token + result < tokens * inputs**2 / 2 + outputs * by_pairs

    count = {"out_features": outputs, "in_features": inputs, "num_heads": num_heads, "fused": fused}
    for tokens in (1, most, most + 1, 10 * most):
        assert heads.cheaper_method(tokens, **count) == ("stream" if stream_is_cheaper(tokens) else "gram")
    assert heads.cheaper_method(most, **count) == "stream" and heads.cheaper_method(most + 1, **count) == "gram"


@pytest.mark.parametrize(
    ("heads", "outputs", "group", "dtype"),
    [(8, 30, 8, torch.float64), (9, 600, 3, torch.float32), (5, 7, 5, torch.float32), (12, 64, 4, torch.float64)],
)
def test_greedy_search_as_by_trying(backend: str, heads: int, outputs: int, group: int, dtype: torch.dtype) -> None:
    exchanged = 0
    for seed in range(3):
        torch.manual_seed(seed)
        weight, x = torch.randn(outputs, heads * 4), torch.randn(200, heads * 4) @ torch.randn(heads * 4, heads * 4)
        covariance = pearson.head_covariance_reference(weight, x, heads).to(dtype).to(DEVICE)
        for pruned in (0, heads // group, heads // group * (group // 2)):
            kept = torch.ones(heads, dtype=torch.bool)
            order = ops.head_importance(covariance).argsort().tolist()
            chosen = [[p for p in order if p // group == g][: pruned // (heads // group)] for g in range(heads // group)]
            goes = [p for p in order if any(p in c for c in chosen)]
            kept[goes] = False
            naive = kept.nonzero().flatten().tolist()
            exchange.exchange_reference(kept, covariance.cpu(), torch.tensor(goes, dtype=torch.int64), group, ROUNDING)
            got = ops.pearson_greedy(covariance, pruned, group if group < heads else 1)
            assert got.device == covariance.device and got.dtype == torch.int64
            assert got.tolist() == kept.nonzero().flatten().tolist()
            exchanged += got.tolist() != naive
    assert exchanged or heads != 8  # the test is worth little if no exchange ever happens


def test_equal_heads_are_not_exchanged(backend: str) -> None:
    """Which of two equal heads stays would be up to rounding, and so to the backend."""
    for seed in range(20):
        torch.manual_seed(seed)
        weight, x = torch.randn(30, 4, 4), torch.randn(200, 4, 4)
        double = [0, 1, 2, 3, 0, 1, 2, 3]
        weight, x = weight[:, double].flatten(1), x[:, double].flatten(1)
        covariance = pearson.head_covariance_reference(weight, x, 8)
        covariance = covariance[double][:, double].to(DEVICE)  # equal to the last bit
        kept = set(ops.pearson_greedy(covariance, 4).tolist())
        order = ops.head_importance(covariance).argsort(stable=True).tolist()
        flags = torch.ones(8, dtype=torch.bool)
        flags[order[:4]] = False
        exchange.exchange_reference(flags, covariance.cpu(), torch.tensor(order[:4]), 8, ROUNDING)
        assert {head % 4 for head in kept} == {head % 4 for head in flags.nonzero().flatten().tolist()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (7, 63), (5, 1100)])
def test_cosine_of_tokens(backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a = torch.randn(shape).to(dtype).to(DEVICE)
    b = (a.float() + torch.randn(shape, device=DEVICE)).to(dtype).T.contiguous().T
    if shape[0] > 3:
        a[2] = 0
    got = ops.token_cosine(a, b)
    assert got.dtype == torch.float32
    assert_close(got, cosine.token_cosine_reference(a, b), torch.cosine_similarity(a.float(), b.float(), dim=-1), 1e-6)


def test_cosine_of_enormous_tokens(backend: str) -> None:
    a = torch.full((2, 100), 1e15, device=DEVICE)
    assert torch.allclose(ops.token_cosine(a, -a), torch.full((2,), -1.0, device=DEVICE))
