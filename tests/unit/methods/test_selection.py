from __future__ import annotations

import copy

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from slimllm import PruneConfig, prune_model
from slimllm.methods.selection import select_channels
from slimllm.ops import feature_space_importance, head_covariance, head_importance, pearson_greedy, pearson_similarity
from slimllm.statistics import GramStatistics
from slimllm.statistics.tokens import layer_similarity


def case(seed: int, heads: int, head_dim: int = 3, out: int = 10, tokens: int = 80) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = heads * head_dim
    x = torch.randn(tokens, features, generator=generator) @ torch.randn(features, features, generator=generator)
    return x + 5 * torch.randn(features, generator=generator), torch.randn(out, features, generator=generator)


def covariance_of(x: torch.Tensor, weight: torch.Tensor, heads: int) -> torch.Tensor:
    statistics = GramStatistics(x.shape[1])
    statistics.update(x)
    return head_covariance(weight, statistics.covariance(), heads)


def spectrum_case(kind: str, size: int = 96) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W (size, 300), a covariance with such a spectrum, and norms of channels."""
    generator = torch.Generator().manual_seed(3)
    values = torch.exp(2 * torch.randn(size, generator=generator, dtype=torch.float64))
    if kind == "one enormous":
        values[0] = 1e6 * values.sum()
    elif kind == "rank deficient":
        values[size // 4 :] = 0
    elif kind == "flat":
        values[:] = 1e-12
    elif kind == "hidden":  # the leading direction has no part in the largest elements of the diagonal
        few = torch.arange(size) < 8
        covariance = torch.diag(torch.where(few, 100.0, 1.0).double())
        covariance[8:, 8:] += 1e4 / (size - 8)
        return torch.randn(size, 300, generator=generator), covariance, torch.rand(300, generator=generator).double()
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    covariance = (basis * values) @ basis.T
    norms = torch.rand(300, generator=generator, dtype=torch.float64)
    return torch.randn(size, 300, generator=generator), (covariance + covariance.T) / 2, norms


@pytest.mark.parametrize("method", ["function", "eigh"])
@pytest.mark.parametrize("size", [96, 601])
@pytest.mark.parametrize("kind", ["heavy tail", "one enormous", "rank deficient", "flat", "hidden"])
def test_importance_in_the_feature_space_by_either_method(kind: str, method: str, size: int) -> None:
    weight, covariance, norms = spectrum_case(kind, size)
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    scale = torch.sigmoid(eigenvalues.abs() / eigenvalues.abs().mean())
    wanted = norms * torch.linalg.vector_norm((vectors * scale).T @ weight.double(), dim=0)
    importance = feature_space_importance(weight, covariance, norms, method)
    assert ((importance - wanted).abs() <= 1e-6 * wanted).all()
    for pruned in (60, 150):
        assert select_channels(importance, pruned).tolist() == select_channels(wanted, pruned).tolist()


@pytest.mark.parametrize("method", ["function", "eigh"])
def test_importance_without_any_variance(method: str) -> None:
    weight, covariance, norms = spectrum_case("flat")
    importance = feature_space_importance(weight, torch.zeros_like(covariance), norms, method)
    assert torch.allclose(importance, norms * torch.linalg.vector_norm(weight.double(), dim=0) / 2)


def test_feature_space_errors() -> None:
    weight, covariance, norms = spectrum_case("flat")
    with pytest.raises(ValueError, match="must have shapes"):
        feature_space_importance(weight, covariance[:5, :5], norms)
    with pytest.raises(ValueError, match="function or eigh, got 'svd'"):
        feature_space_importance(weight, covariance, norms, "svd")


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), heads=st.integers(1, 7))
def test_head_covariance_is_that_of_the_outputs(seed: int, heads: int) -> None:
    x, weight = case(seed, heads)
    outputs = reference.head_outputs(x, weight, heads)
    centered = outputs - outputs.mean(0)
    wanted = torch.einsum("nki,nkj->ijk", centered, centered) / len(x)
    assert (covariance_of(x, weight, heads) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), heads=st.integers(2, 8), data=st.data())
def test_heads_as_by_brute_force(seed: int, heads: int, data: st.DataObject) -> None:
    x, weight = case(seed, heads)
    pruned = data.draw(st.integers(0, heads - 1))
    kept = pearson_greedy(covariance_of(x, weight, heads), pruned)
    assert kept.dtype == torch.int64 and len(kept) == heads - pruned
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert kept.tolist() == reference.choose_heads(reference.head_outputs(x, weight, heads), pruned)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), groups=st.integers(1, 4), group_size=st.integers(2, 4), data=st.data())
def test_every_group_loses_the_same(seed: int, groups: int, group_size: int, data: st.DataObject) -> None:
    heads = groups * group_size
    x, weight = case(seed, heads)
    pruned = groups * data.draw(st.integers(0, group_size - 1))
    kept = pearson_greedy(covariance_of(x, weight, heads), pruned, group_size)
    assert torch.bincount(kept // group_size, minlength=groups).tolist() == [group_size - pruned // groups] * groups
    assert kept.tolist() == reference.choose_heads(reference.head_outputs(x, weight, heads), pruned, group_size)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 100))
def test_similarity_does_not_see_shift_and_scale(seed: int, scale: float) -> None:
    x, weight = case(seed, 4)
    assert torch.allclose(
        head_importance(covariance_of(x, weight, 4)), head_importance(covariance_of((x + 7) * scale, weight, 4)), rtol=1e-4
    )


def test_a_constant_output_counts_nothing() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    assert pearson_similarity(zero, zero, one) == 0
    assert pearson_similarity(one, one, one) == 3


def test_dead_heads_go_first() -> None:
    x, weight = case(0, 5)
    weight[:, 3:6] = 0
    assert pearson_greedy(covariance_of(x, weight, 5), 1).tolist() == [0, 2, 3, 4]


def test_feature_space_importance_against_plain_pca() -> None:
    inner, down = torch.randn(200, 30) + 2, torch.randn(12, 30)
    gate = torch.zeros(30, 12)
    statistics = GramStatistics(12)
    statistics.update(inner @ down.T)
    got = feature_space_importance(down, statistics.covariance(), inner.double().norm(dim=0))
    wanted = reference.channel_importance(torch.zeros(200, 12), inner, gate, gate, down)
    assert torch.allclose(got, wanted, rtol=1e-5)


def test_feature_space_importance_of_a_constant_output() -> None:
    got = feature_space_importance(torch.ones(2, 3), torch.zeros(2, 2, dtype=torch.float64), torch.ones(3))
    assert torch.isfinite(got).all() and (got > 0).all()


@settings(max_examples=50, deadline=None)
@given(importance=st.lists(st.floats(0, 100), min_size=2, max_size=30), data=st.data())
def test_channels(importance: list[float], data: st.DataObject) -> None:
    scores = torch.tensor(importance)
    pruned = data.draw(st.integers(0, len(scores) - 1))
    kept = select_channels(scores, pruned)
    assert kept.tolist() == sorted(set(kept.tolist())) and len(kept) == len(scores) - pruned
    gone = sorted(set(range(len(scores))) - set(kept.tolist()))
    assert not gone or scores[gone].max() <= scores[kept].min()


def test_the_lowest_stay_when_asked_for() -> None:
    assert select_channels(torch.arange(10.0), 3, keep_lowest=2).tolist() == [0, 1, 5, 6, 7, 8, 9]


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="must be from 0 to 3, got 4"):
        pearson_greedy(torch.zeros(4, 4, 2, dtype=torch.float64), 4)
    with pytest.raises(ValueError, match="a multiple of 2, as many from every group of 2, got 1"):
        pearson_greedy(torch.zeros(4, 4, 2, dtype=torch.float64), 1, group_size=2)
    with pytest.raises(ValueError, match="cannot prune 5 of 5"):
        select_channels(torch.zeros(5), 5)
    with pytest.raises(ValueError, match="got"):
        head_covariance(torch.zeros(4, 6), torch.zeros(6, 6), 4)


def test_layer_similarity() -> None:
    a, b = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    wanted = torch.cosine_similarity(a.double(), b.double(), dim=-1).sum()
    assert torch.allclose(layer_similarity(a, b), wanted, atol=1e-5)
    assert layer_similarity(torch.zeros(1, 1, 4), torch.ones(1, 1, 4)) == 0


def test_the_published_variant_keeps_to_eigenvectors(monkeypatch: pytest.MonkeyPatch, stories: PreTrainedModel) -> None:
    """Wide layers are measured by a matrix function on a CPU, too, but not those of the preset paper."""
    from slimllm.ops import channels

    seen: list[bool] = []

    def counted(matrix: torch.Tensor) -> torch.Tensor:
        seen.append(True)
        return function(matrix)

    function = channels._sigmoid_root
    monkeypatch.setattr(channels, "_MOST_VECTORS", 32)  # fewer than the model's 64
    monkeypatch.setattr(channels, "_sigmoid_root", counted)
    windows = torch.randint(3, 500, (8, 32), generator=torch.Generator().manual_seed(0))
    for preset, wanted in (("paper", False), ("slimllm", True)):
        seen.clear()
        prune_model(copy.deepcopy(stories), windows, PruneConfig(ratio=0.3, preset=preset))
        assert bool(seen) == wanted
