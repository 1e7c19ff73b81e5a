from __future__ import annotations

import pytest
import torch
from conftest import needs_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import FLOOR, assert_close

from slimllm.statistics import ColumnStatistics, GramStatistics, PairedMoments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def covariance(x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    centered = x - x.mean(0)
    return centered.T @ centered / len(x)


def gathered(x: torch.Tensor, cuts: list[int]) -> GramStatistics:
    statistics = GramStatistics(x.shape[1])
    for part in x.tensor_split(cuts):
        statistics.update(part)
    return statistics


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 130), features=st.integers(1, 40), data=st.data())
def test_any_split_gives_the_same(seed: int, tokens: int, features: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=generator) * 3 + 10 * torch.randn(features, generator=generator)
    cuts = sorted(data.draw(st.lists(st.integers(0, tokens), max_size=4)))
    wanted = covariance(x)
    scale = x.double().square().mean()
    for statistics in (gathered(x, []), gathered(x, cuts)):
        got = statistics.covariance()
        assert_close(got, wanted, plain=wanted, floor=5e-6, scale=scale)
        assert torch.equal(got, got.T)
        assert torch.linalg.eigvalsh(got).min() >= -5e-6 * scale
        assert_close(statistics.mean(), x.double().mean(0), plain=x.mean(0), floor=1e-6)
    parts = [gathered(part, []) for part in x.tensor_split(cuts) if len(part)]
    merged = parts[0]
    for part in parts[1:]:
        merged.merge(part)
    assert merged.count == tokens
    assert_close(merged.covariance(), wanted, plain=wanted, floor=5e-6, scale=scale)


def test_mean_ten_thousand_times_the_spread() -> None:
    """Where the raw Gram in fp32 has lost every digit of the covariance, the one about a pivot keeps five."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(4096, 32, generator=generator) @ torch.randn(32, 32, generator=generator) / 32**0.5
    x = spread + 1e4 * torch.sign(torch.randn(32, generator=generator))
    wanted = covariance(x)
    raw = x.T @ x / len(x) - torch.outer(x.mean(0), x.mean(0))
    assert (raw.double() - wanted).abs().max() > 0.5 * wanted.abs().max()
    for statistics in (gathered(x, []), gathered(x, [1000, 3000])):
        assert (statistics.covariance() - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_first_batch_far_from_the_rest() -> None:
    """The pivot is that of the first batch; the stream may still wander by several spreads."""
    x = torch.randn(2000, 8) + torch.linspace(0, 20, 2000)[:, None]
    assert (gathered(x, [10, 500]).covariance() - covariance(x)).abs().max() <= 1e-5 * covariance(x).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """What a Gram on another device than the tokens is made of, with tiles that do not divide it."""
    monkeypatch.setattr("slimllm.statistics.gram.TILE", 70)
    x = (torch.randn(90, 200, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 200) + 3).to(dtype)
    whole, tiled = GramStatistics(200), GramStatistics(200)
    whole.update(x[:40])
    tiled.update(x[:40])  # chooses the pivot
    whole.update(x[40:])
    tiled._add_tiles([(x[40:], None)])
    tiled.count, tiled.mass = 90, 90.0
    scale = whole.covariance().diagonal().sqrt()
    assert float(((tiled.covariance() - whole.covariance()).abs() / (scale[:, None] * scale)).max()) < 1e-5
    assert torch.equal(tiled.gram, tiled.gram.T)
    assert float(((tiled.mean() - whole.mean()).abs() / scale).max()) < 1e-6


def test_merge_with_empty_and_into_empty() -> None:
    x = torch.randn(50, 4) + 100
    full, empty = gathered(x, []), GramStatistics(4)
    full.merge(GramStatistics(4))
    empty.merge(full)
    assert torch.allclose(empty.covariance(), full.covariance()) and empty.count == 50


def test_one_token_has_no_spread() -> None:
    statistics = gathered(torch.randn(1, 5) * 1e4, [])
    assert statistics.covariance().abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_taken_as_they_are(dtype: torch.dtype) -> None:
    x = (torch.randn(300, 16) * 2 + 5).to(dtype)
    assert (gathered(x, [100]).covariance() - covariance(x)).abs().max() <= 1e-5 * covariance(x).abs().max()


def test_non_contiguous() -> None:
    x = torch.randn(16, 300).T[::2]
    assert_close(gathered(x, []).covariance(), covariance(x), plain=covariance(x), floor=FLOOR[torch.float32] * 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("huge", [False, True])
def test_weights(dtype: torch.dtype, huge: bool) -> None:
    """Against fp64, in batches, merged, and about another pivot; a token may be enormous whose weight is tiny."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 24, generator=generator) * torch.logspace(-1, 1, 24) + 20
    weight = torch.rand(400, generator=generator) + 0.1
    if huge:
        x[::100, :3] *= 3000
        weight[::100] = 1e-9
    x = x.to(dtype)
    precise, w = x.double(), weight.double()
    mean = w @ precise / w.sum()
    u = precise - mean
    wanted = (u.T * w) @ u / w.sum()
    scale = wanted.diagonal().sqrt()
    whole, halves, columns = GramStatistics(24), [GramStatistics(24), GramStatistics(24)], ColumnStatistics(24)
    for number, (some, own) in enumerate(zip(x.split(70), weight.split(70))):
        whole.update(some, own)
        columns.update(some, own)
        halves[number % 2].update(some, own)
    halves[0].merge(halves[1])
    other = GramStatistics(24)
    other.merge(whole)
    other.move(torch.full((24,), 19.0))
    floor = 1e-5 if dtype == torch.float32 else 2e-2  # 16 bits of (x - pivot) and of w (x - pivot)
    for found in (whole, halves[0], other):
        assert found.count == 400 and found.mass == pytest.approx(float(w.sum()))
        assert float(((found.covariance() - wanted) / (scale[:, None] * scale)).abs().max()) < (1e-3 if huge else floor)
        assert torch.allclose(found.mean(), mean, rtol=1e-5)
        assert torch.allclose(found.norms(), (w @ precise.square()).sqrt(), rtol=1e-5)
    assert torch.allclose(columns.mean(), mean, rtol=1e-5)
    assert torch.allclose(columns.variance(), wanted.diagonal(), rtol=1e-3 if huge else 1e-4)
    pairs = PairedMoments(columns.mean(), 2 * columns.mean())
    pairs.update(x, (2 * x.float()).to(dtype), weight)
    assert torch.allclose(pairs.covariance(), 2 * wanted.diagonal(), rtol=1e-3)
    assert torch.allclose(pairs.variance(), 4 * wanted.diagonal(), rtol=1e-3)


def test_weights_are_as_good_as_repetition() -> None:
    x = torch.randn(50, 9, generator=torch.Generator().manual_seed(0)) + 3
    times = torch.randint(0, 4, (50,), generator=torch.Generator().manual_seed(1))
    weighted, repeated = GramStatistics(9), GramStatistics(9)
    weighted.update(x, times.float())
    repeated.update(x.repeat_interleave(times, 0))
    assert weighted.mass == repeated.count == repeated.mass
    assert torch.allclose(weighted.covariance(), repeated.covariance(), rtol=1e-5, atol=1e-6)
    nothing = GramStatistics(9)
    nothing.update(x, torch.zeros(50))
    with pytest.raises(ValueError, match="or none with a weight above 0"):
        nothing.covariance()
    with pytest.raises(ValueError, match=r"weight must have shape \(50,\), one for each token"):
        nothing.update(x, torch.ones(49))
    with pytest.raises(TypeError, match="weight must be a floating tensor"):
        nothing.update(x, torch.ones(50, dtype=torch.int64))


def test_errors() -> None:
    statistics = GramStatistics(4)
    with pytest.raises(ValueError, match="no tokens"):
        statistics.covariance()
    with pytest.raises(ValueError, match=r"shape \(num_tokens, 4\)"):
        statistics.update(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="cannot merge"):
        statistics.merge(GramStatistics(5))
    with pytest.raises(ValueError, match="at least 1"):
        GramStatistics(0)
    columns = ColumnStatistics(4)
    for call in (columns.mean, columns.variance, columns.norms):
        with pytest.raises(ValueError, match="no tokens"):
            call()
    for shape in ((3, 1), (4,)):
        with pytest.raises(ValueError, match=r"shape \(num_tokens, 4\)"):
            columns.update(torch.zeros(shape))
    with pytest.raises(ValueError, match="cannot merge"):
        columns.merge(ColumnStatistics(1))
    with pytest.raises(ValueError, match="at least 1"):
        ColumnStatistics(0)


def test_column_statistics() -> None:
    x = torch.randn(500, 12) + 1000
    statistics = ColumnStatistics(12)
    for part in x.split(130):
        statistics.update(part)
    assert_close(statistics.norms(), x.double().norm(dim=0), plain=x.norm(dim=0), floor=1e-6)
    assert_close(statistics.variance(), x.double().var(0, correction=0), plain=x.var(0, correction=0), floor=1e-6)
    assert_close(statistics.mean(), x.double().mean(0), plain=x.mean(0), floor=1e-6)


def test_parts_of_a_stream_add_up() -> None:
    y, y_hat = torch.randn(100, 4).double() + 5, torch.randn(100, 4).double()
    whole, parts = ColumnStatistics(4), [ColumnStatistics(4), ColumnStatistics(4)]
    pair = PairedMoments(y.mean(0), y_hat.mean(0))
    pairs = [PairedMoments(y.mean(0), y_hat.mean(0)) for _ in range(2)]
    whole.update(y)
    pair.update(y, y_hat)
    for part, moments, rows in zip(parts, pairs, (slice(0, 30), slice(30, 100))):
        part.update(y[rows])
        moments.update(y[rows], y_hat[rows])
    parts[0].merge(parts[1])
    pairs[0].merge(pairs[1])
    assert torch.allclose(parts[0].norms(), whole.norms()) and torch.allclose(parts[0].mean(), whole.mean())
    assert torch.allclose(parts[0].variance(), whole.variance())
    assert torch.allclose(pairs[0].variance(), pair.variance(), rtol=1e-5)
    assert torch.allclose(pairs[0].covariance(), pair.covariance(), rtol=1e-4, atol=1e-6)


def test_paired_moments_with_large_means() -> None:
    y = torch.randn(800, 6) + 3000
    y_hat = 0.5 * y + torch.randn(800, 6)
    moments = PairedMoments(y.double().mean(0), y_hat.double().mean(0))
    for part in torch.arange(800).split(300):
        moments.update(y[part], y_hat[part])
    centered, centered_hat = y.double() - y.double().mean(0), y_hat.double() - y_hat.double().mean(0)
    assert torch.allclose(moments.variance(), centered_hat.square().mean(0), rtol=1e-4)
    assert torch.allclose(moments.covariance(), (centered * centered_hat).mean(0), rtol=1e-4)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_kernels)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0.0, 3.9, 10.0, 100.0, 3000.0])
def test_half_precision_loses_nothing_that_was_there(
    monkeypatch: pytest.MonkeyPatch, mean: float, dtype: torch.dtype, backend: str
) -> None:
    """Against fp64 on the same half-precision numbers, however far the mean is from zero."""
    monkeypatch.setenv("SLIMLLM_BACKEND", backend)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(600, 70, generator=generator)
    x[:, ::2] += mean
    x[:, 5], x[:, 6] = 0.0, mean  # a dead feature and a constant one
    x = x.to(dtype)
    statistics = GramStatistics(70, DEVICE)
    for batch in x.split(250):
        statistics.update(batch.to(DEVICE))
    centered = x.double() - x.double().mean(0)
    wanted = centered.T @ centered / len(x)
    scale = wanted.diagonal().sqrt()
    error = (statistics.covariance().cpu() - wanted).abs()
    # The kernel has 16 bits of differences in bf16, and the interpreter cuts the rest off.
    floor = 3 * 2.0**-16 if (dtype, backend) == (torch.bfloat16, "triton") else 5e-6
    if 0 < mean < 4:  # no pivot yet: as exact as a plain product, the order of whose sums is the processor's
        plain = (x.float().T @ x.float()).double() / len(x) - torch.outer(x.double().mean(0), x.double().mean(0))
        varying = scale > 0
        off = (plain - wanted).abs()[varying][:, varying] / torch.outer(scale[varying], scale[varying])
        floor += 2 * float(off.max())
    assert (error <= floor * torch.outer(scale, scale) + 1e-9 * mean).all()
    assert torch.allclose(statistics.mean().cpu(), x.double().mean(0), atol=1e-6 * (1 + mean))


def test_many_batches_in_half_precision_lose_nothing() -> None:
    """A mean just below that at which there is a pivot, and 64 batches."""
    x = (torch.randn(64 * 512, 24, generator=torch.Generator().manual_seed(0)) + 3.8).bfloat16()
    statistics = GramStatistics(24, DEVICE)
    for batch in x.split(512):
        statistics.update(batch.to(DEVICE))
    wanted = covariance(x)
    assert (statistics.covariance().cpu() - wanted).abs().max() <= 1e-5 * wanted.diagonal().max()


def test_statistics_keep_no_graph_and_refuse_what_would_broadcast() -> None:
    x = torch.randn(20, 6, requires_grad=True)
    columns, paired = ColumnStatistics(6), PairedMoments(torch.zeros(6).double(), torch.zeros(6).double())
    for _ in range(2):
        columns.update(x * 2)
        paired.update(x * 2, x + 1)
    assert not columns.norms().requires_grad and not columns.mean().requires_grad
    assert not paired.covariance().requires_grad and not paired.variance().requires_grad
    for y_hat in (x[:1], x[:, :1], x[0]):
        with pytest.raises(ValueError, match=r"y_hat must have"):
            paired.update(x, y_hat)
    with pytest.raises(ValueError, match="no tokens have been added"):
        PairedMoments(torch.zeros(6), torch.zeros(6)).variance()
    with pytest.raises(ValueError, match=r"mean_y and mean_y_hat must be \(features,\)"):
        PairedMoments(torch.zeros(6), torch.zeros(1))
    with pytest.raises(TypeError, match="only another GramStatistics can be merged, got ColumnStatistics"):
        GramStatistics(6).merge(columns)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="x must be a floating tensor"):
        columns.update(torch.zeros(3, 6, dtype=torch.int64))


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_parts_of_a_covariance(offset: float) -> None:
    """Blocks, norms, and the covariance of a product, against fp64 on the tokens; where the mean dwarfs the spread too."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(700, 300, generator=generator) * torch.logspace(-2, 1, 300) + offset * torch.randn(300)
    weight = torch.randn(40, 300, generator=generator)
    statistics = GramStatistics(300)
    for part in x.split(256):
        statistics.update(part)
    u = x.double() - x.double().mean(0)
    covariance = u.T @ u / len(x)
    scale = covariance.diagonal().sqrt()
    rows, columns = torch.tensor([5, 0, 299]), torch.arange(100, 260)
    got, wanted = statistics.block(rows, columns), covariance[rows][:, columns]
    assert ((got - wanted).abs() <= 1e-5 * scale[rows, None] * scale[columns]).all()
    full = statistics.covariance()
    assert torch.equal(full, full.T) and torch.allclose(statistics.block(rows, rows), full[rows][:, rows])
    assert torch.allclose(statistics.norms(), x.double().norm(dim=0), rtol=1e-5)
    product = weight.double() @ covariance @ weight.double().T
    error = (statistics.of_product(weight) - product).abs().max() / product.diagonal().max()
    assert error <= 1e-5
    for unready in (GramStatistics(3).norms, lambda: GramStatistics(3).block(rows, rows)):
        with pytest.raises(ValueError, match="no tokens"):
            unready()
