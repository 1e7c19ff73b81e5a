"""The operations as others use them: registration, regression, and the choice of a backend."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from conftest import needs_kernels

from slimllm import InputError, ops
from slimllm.ops import dispatch, gram, selfcheck
from slimllm.ops.registry import OPERATIONS
from slimllm.runtime import doctor
from slimllm.statistics import GramStatistics


def sample() -> dict[str, tuple[Any, ...]]:
    torch.manual_seed(0)
    x, weight = torch.randn(20, 12), torch.randn(7, 12)
    covariance = (x.T @ x / 20).double()
    by_head = ops.head_covariance(weight, covariance, 3)
    return {
        "gram_": (torch.zeros(12, 12), torch.zeros(12), x, x[0].clone(), torch.rand(20)),
        "head_covariance": (weight, covariance, 3),
        "head_covariance_of_tokens": (weight, x, 3, "stream"),
        "pearson_greedy": (by_head, 1, 1),
        "token_cosine": (x, x + 1),
        "greedy_elimination": (x.T @ x + torch.eye(12), weight.T @ weight, 5),
        "affine_fit": tuple(torch.rand(4, 7)),
        "half_solve_": ((x.T @ x + torch.eye(12))[None], weight.T.contiguous()[None]),
        "quadratic_forms": ((x.T @ x + torch.eye(12))[None], weight.T[None]),
    }


@pytest.mark.real_device
@pytest.mark.parametrize("name", sample())
def test_registration(name: str) -> None:
    operator = getattr(torch.ops.slimllm, name).default
    assert set(torch.library.opcheck(operator, sample()[name]).values()) == {"SUCCESS"}


def calls() -> dict[str, Any]:
    """Every operation as a function without arguments that returns a tensor."""
    torch.manual_seed(0)
    x, weight = torch.randn(40, 12), torch.randn(7, 12)
    covariance = x.T @ x / 40
    output, products = (weight @ covariance @ weight.T).double(), weight.T @ weight

    def gram() -> torch.Tensor:
        result = torch.zeros(12, 12)
        ops.gram_(result, torch.zeros(12), x)
        return result

    return {
        "gram_": gram,
        "head_covariance": lambda: ops.head_covariance(weight, covariance, 3),
        "stream": lambda: ops.head_covariance_of_tokens(weight, x, 3, method="stream"),
        "token_cosine": lambda: ops.token_cosine(x, x + 1),
        "function": lambda: ops.feature_space_importance(weight, output, torch.ones(12), "function"),
        "eigh": lambda: ops.feature_space_importance(weight, output, torch.ones(12), "eigh"),
        "pearson_greedy": lambda: ops.pearson_greedy(ops.head_covariance(weight, covariance, 3), 1),
        "greedy_elimination": lambda: ops.greedy_elimination(covariance, products, 5)[1],
    }


@pytest.mark.parametrize("name", calls())
def test_the_callers_precision_changes_nothing(name: str) -> None:
    call = calls()[name]
    wanted = call()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(), wanted)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(call(), wanted)
        assert torch.get_float32_matmul_precision() == "medium" and torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)
    if hasattr(torch.backends.mkldnn, "matmul") and hasattr(torch.backends.mkldnn.matmul, "fp32_precision"):
        settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        old = [setting.fp32_precision for setting in settings]
        try:
            settings[0].fp32_precision, settings[1].fp32_precision = "tf32", "bf16"
            assert torch.equal(call(), wanted)
            assert [setting.fp32_precision for setting in settings] == ["tf32", "bf16"]
        finally:
            for setting, value in zip(settings, old):
                setting.fp32_precision = value


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_kernels)])
def test_accumulators_keep_no_graph(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setenv("SLIMLLM_BACKEND", backend)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, pivot = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((20, 12), (12,)))
    gram, total = torch.zeros(12, 12, device=device), torch.zeros(12, device=device)
    ops.gram_(gram, total, x, pivot=pivot)
    assert not gram.requires_grad and not total.requires_grad
    statistics = GramStatistics(12, device)
    statistics.update(x)
    assert not statistics.covariance().requires_grad


@pytest.mark.real_device
def test_under_torch_compile() -> None:
    x, weight = torch.randn(20, 12), torch.randn(7, 12)

    def method(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gram, total = torch.zeros(12, 12), torch.zeros(12)
        ops.gram_(gram, total, x)
        kept = ops.pearson_greedy(ops.head_covariance(weight, gram / len(x), 3), 1)
        by_head = ops.head_covariance_of_tokens(weight, x, 3) + ops.head_covariance_of_tokens(weight, x, 3, method="gram")
        squares, products = torch.zeros(12), torch.zeros(12)
        ops.column_sums_(total, squares, x)
        ops.column_products_(squares, products, x, x + 1, pivot_y=x[0], pivot_y_hat=x[1])
        slope, intercept = ops.affine_fit(x[0], x[1], x[2].abs(), x[3])
        return (
            slope + 0,
            intercept + 0,
            gram * 2,
            kept + 0,
            by_head,
            ops.token_cosine(x, x + 1),
            total + 0,
            squares + products,
        )

    compiled = torch.compile(method, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(x), method(x)):
        assert torch.equal(got, wanted)


def test_affine_fit_is_numpys_polyfit() -> None:
    import numpy as np

    torch.manual_seed(0)
    y, y_hat = torch.randn(50, 6, dtype=torch.float64) + 3, torch.randn(50, 6, dtype=torch.float64) * 2 - 5
    y = y + 0.7 * y_hat
    y_hat[:, 5] = 4.0
    centered = y_hat - y_hat.mean(0)
    slope, intercept = ops.affine_fit(
        y.mean(0), y_hat.mean(0), centered.square().mean(0), ((y - y.mean(0)) * centered).mean(0)
    )
    for k in range(5):
        a, b = np.polyfit(y_hat[:, k].numpy(), y[:, k].numpy(), 1)
        assert abs(slope[k] - a) < 1e-9 and abs(intercept[k] - b) < 1e-9
    assert ops.affine_fit(slope, slope, slope * torch.nan, slope)[0].isnan().all()
    assert slope[5] == 1 and torch.isclose(intercept[5], y[:, 5].mean() - 4)
    with pytest.raises(ValueError, match="must have the shape of mean_y"):
        ops.affine_fit(slope, slope, slope, slope[:2])


def test_errors_of_the_others() -> None:
    weight, x = torch.zeros(4, 6), torch.zeros(5, 6)
    with pytest.raises(ValueError, match="divisible by num_heads = 4"):
        ops.head_covariance(weight, torch.zeros(6, 6), 4)
    with pytest.raises(TypeError, match="float64 or float32"):
        ops.head_covariance(weight, torch.zeros(6, 6).half(), 3)
    with pytest.raises(TypeError, match="floating"):
        ops.head_covariance(weight.int(), torch.zeros(6, 6), 3)
    with pytest.raises(ValueError, match="no tokens"):
        ops.head_covariance_of_tokens(weight, x[:0], 3)
    with pytest.raises(ValueError, match="stream, gram or None, got 'fast'"):
        ops.head_covariance_of_tokens(weight, x, 3, method="fast")
    with pytest.raises(TypeError, match="x must be float32"):
        ops.head_covariance_of_tokens(weight, x.double(), 3)
    with pytest.raises(ValueError, match=r"\(H, H, D\)"):
        ops.pearson_greedy(torch.zeros(3, 4, 5), 1)
    with pytest.raises(TypeError, match="covariance"):
        ops.pearson_greedy(torch.zeros(3, 3, 5).half(), 1)
    for group_size in (0, -2, 3, 8):
        with pytest.raises(ValueError, match=f"divide the number of heads, 4, got {group_size}"):
            ops.pearson_greedy(torch.zeros(4, 4, 5), 2, group_size)
    with pytest.raises(ValueError, match="a multiple of 2, as many from every group of 2, got 1"):
        ops.pearson_greedy(torch.zeros(4, 4, 5), 1, 2)
    with pytest.raises(ValueError, match=r"\(H, H, D\)"):
        ops.head_importance(torch.zeros(3, 4, 5))
    with pytest.raises(ValueError, match=r"\(D, I\), \(D, D\) and \(I,\)"):
        ops.feature_space_importance(torch.zeros(3), torch.zeros(3, 3), torch.zeros(4))
    with pytest.raises(TypeError, match="floating"):
        ops.feature_space_importance(torch.zeros(3, 4), torch.zeros(3, 3).int(), torch.zeros(4))
    for call in (ops.head_importance, lambda covariance: ops.pearson_greedy(covariance, 1)):
        with pytest.raises(ValueError, match="must be finite"):
            call(torch.full((3, 3, 5), torch.nan))
    for method in ("eigh", "function"):
        for place in ((0, 0), (0, 1)):
            bad = torch.eye(3, dtype=torch.float64)
            bad[place] = torch.nan
            with pytest.raises(ValueError, match="must be finite"):
                ops.feature_space_importance(torch.ones(3, 4), bad, torch.ones(4), method)
    with pytest.raises(TypeError, match="must be of a floating dtype"):
        ops.affine_fit(*torch.ones(4, 3, dtype=torch.int64))
    for inverse, products in ((torch.eye(3), torch.eye(4)), (torch.zeros(3, 4), torch.zeros(3, 4)), (x[0], x[0])):
        with pytest.raises(ValueError, match=r"must both be \(p, p\)"):
            ops.greedy_elimination(inverse, products, 1)
    for num in (-1, 4):
        with pytest.raises(ValueError, match=f"from 0 to the number of candidates, 3, got {num}"):
            ops.greedy_elimination(torch.eye(3), torch.eye(3), num)
    with pytest.raises(TypeError, match="products must be float32, got float64"):
        ops.greedy_elimination(torch.eye(3), torch.eye(3).double(), 1)
    with pytest.raises(ValueError, match="one shape"):
        ops.token_cosine(x, x[:2])
    with pytest.raises(TypeError, match="a must be float32"):
        ops.token_cosine(x.double(), x.double())


def test_arguments_that_are_no_tensors_or_no_integers() -> None:
    x, weight = torch.zeros(5, 6), torch.zeros(4, 6)
    zeros = torch.zeros(6)
    for call in (
        lambda other: ops.gram_(torch.zeros(6, 6), zeros, other),
        lambda other: ops.gram_(torch.zeros(6, 6), zeros, x, pivot=other),
        lambda other: ops.head_covariance(weight, other, 3),
        lambda other: ops.head_covariance_of_tokens(weight, other, 3),
        lambda other: ops.pearson_greedy(other, 1),
        lambda other: ops.head_importance(other),
        lambda other: ops.feature_space_importance(weight, other, zeros),
        lambda other: ops.affine_fit(zeros, zeros, zeros, other),
        lambda other: ops.lstsq(other, x),
        lambda other: ops.greedy_elimination(torch.zeros(6, 6), other, 1),
        lambda other: ops.token_cosine(x, other),
    ):
        for other in ([[1.0]], x.numpy(), 0.5):
            with pytest.raises(TypeError, match=rf"must be a torch.Tensor, got {type(other).__name__}; torch.as_tensor"):
                call(other)
        with pytest.raises(ValueError, match=r"must be on one device, got .* on meta|shape"):
            call(torch.zeros(6, 6, device="meta"))
    with pytest.raises(TypeError, match=r"num_heads must be an integer, got 3\.0"):
        ops.head_covariance(weight, torch.zeros(6, 6), 3.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="num must be an integer, got True"):
        ops.greedy_elimination(torch.eye(3), torch.eye(3), True)
    with pytest.raises(TypeError, match=r"num_pruned must be an integer, got 0\.25"):
        ops.pearson_greedy(torch.zeros(4, 4, 2), 0.25)  # type: ignore[arg-type]


def test_results_carry_no_gradients() -> None:
    weight, x = torch.randn(7, 12, requires_grad=True), torch.randn(20, 12, requires_grad=True)
    covariance = torch.eye(12, requires_grad=True)
    results = [
        ops.head_covariance(weight, covariance, 3),
        ops.head_covariance_of_tokens(weight, x, 3, method="stream"),
        ops.token_cosine(x, x),
        ops.pearson_greedy(ops.head_covariance(weight, covariance, 3), 1),
    ]
    assert not any(result.requires_grad for result in results)


@needs_kernels
def test_backend_is_chosen_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMLLM_BACKEND", "auto")
    assert dispatch.choose("gram_", "cpu").backend == "torch" and ops.backend("cpu") == "torch"
    monkeypatch.setenv("SLIMLLM_BACKEND", "cublas")
    with pytest.raises(InputError, match="must be one of auto, torch, triton, extension, got 'cublas'"):
        ops.backend("cpu")
    monkeypatch.setenv("SLIMLLM_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(InputError, match="needs a GPU"):
        ops.backend("cpu")


@pytest.fixture
def a_gpu_of_2022(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the choice asks of a GPU; the comparison of kernels with torch then runs on the CPU, interpreted."""
    monkeypatch.setenv("SLIMLLM_BACKEND", "auto")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(selfcheck, "MANY_TOKENS", 320)  # the interpreter is slow
    real = selfcheck.difference
    monkeypatch.setattr(selfcheck, "difference", lambda operation, device, name: real(operation, torch.device("cpu"), name))
    dispatch._automatic.cache_clear()
    yield
    dispatch._automatic.cache_clear()


@needs_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("operation", [name for name, operation in OPERATIONS.items() if operation.cases])
def test_kernels_are_compared_before_they_are_used(
    a_gpu_of_2022: None, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    wanted = "extension" if "cuda" in OPERATIONS[operation].extension else "triton"
    if wanted == "extension":
        if dispatch.extension_is_missing():
            pytest.skip("slimllm._C was not built")
        assert "slimllm._C was built without CUDA (" in dispatch.choose(operation, torch.device("cuda", 0)).reason
        monkeypatch.setattr(dispatch, "extension_is_missing", lambda device_type: "")
    choice = dispatch.choose(operation, torch.device("cuda", 0))
    assert choice.backend == wanted and "agrees with torch" in choice.reason


@needs_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_kernel_that_computes_something_else_is_not_used(
    a_gpu_of_2022: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from slimllm.kernels import cosine, gram

    monkeypatch.setattr(cosine, "token_cosine", lambda a, b: torch.ones(len(a)))

    def fails(*arguments: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(gram, "gram_", fails)
    with caplog.at_level(logging.WARNING, "slimllm"):
        assert ops.backend(torch.device("cuda", 0)) == "triton; torch for gram_, token_cosine"
    assert "disagrees with torch on this GPU" in caplog.text and "no such instruction" in caplog.text
    ops.backend(torch.device("cuda", 0))
    assert len(caplog.records) == 2  # said once


def test_the_comparison_sees_what_is_not_a_number_and_what_is_not_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    if dispatch.extension_is_missing():
        pytest.skip("slimllm._C was not built")
    device = torch.device("cpu")
    assert selfcheck.difference("half_solve_", device, "extension") < 2e-5
    assert selfcheck.difference("lstsq", device, "extension") < 2e-5
    assert selfcheck.difference("greedy_elimination", device, "extension") < 1e-12

    class Broken:
        @staticmethod
        def half_solve_(matrices: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            right.fill_(torch.nan)
            return matrices.new_zeros(len(matrices), dtype=torch.int32)

        @staticmethod
        def quadratic_forms(matrices: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return right.double().sum((1, 2)), matrices.new_zeros(len(matrices), dtype=torch.int32)

        @staticmethod
        def small_lstsq(
            gram: torch.Tensor, cross: torch.Tensor, ridge: torch.Tensor, *_: object
        ) -> tuple[torch.Tensor, ...]:
            return cross * torch.nan, ridge, torch.ones_like(ridge, dtype=torch.int32)

    monkeypatch.setattr(torch.ops, "slimllm_C", Broken)
    for operation in ("half_solve_", "lstsq"):
        assert not selfcheck.difference(operation, device, "extension") <= 2e-5


@pytest.mark.slow
@needs_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_the_comparison_is_the_same_under_other_defaults(a_gpu_of_2022: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "ACTIVATIONS", (torch.bfloat16,))  # of the cases that take longest
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            assert ops.backend(torch.device("cuda", 0)) == "triton"
    finally:
        torch.set_default_dtype(torch.float32)


@needs_kernels
def test_no_memory_is_no_verdict(a_gpu_of_2022: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(operation: str, device: torch.device, backend: str) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(selfcheck, "difference", fails)
        with pytest.raises(torch.OutOfMemoryError):
            dispatch.choose("token_cosine", torch.device("cuda", 0))
    if not torch.cuda.is_available():
        assert dispatch.choose("token_cosine", torch.device("cuda", 0)).backend == "triton"


def test_old_gpus_and_missing_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert "8.0 or later, not 7.5" in dispatch._by_trying("gram_", 0).reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    monkeypatch.setattr(dispatch, "triton_is_missing", lambda: "triton is not installed")
    assert dispatch._by_trying("gram_", 0) == dispatch.Choice("torch", "triton is not installed")


def test_similarity_refuses_what_would_broadcast() -> None:
    good = torch.rand(4, 5), torch.rand(4, 5), torch.rand(5)
    assert ops.pearson_similarity(*good).shape == (4,)
    with pytest.raises(ValueError, match=r"must have shapes .* got \(4, 1\), \(4, 5\) and \(5,\)"):
        ops.pearson_similarity(good[0][:, :1], *good[1:])
    with pytest.raises(ValueError, match="variance must be finite"):
        ops.pearson_similarity(good[0], good[1] * torch.nan, good[2])
    with pytest.raises(TypeError, match="full_variance must be of a floating dtype"):
        ops.pearson_similarity(*good[:2], good[2].int())


def test_results_that_are_written_to_have_memory_of_their_own() -> None:
    x = torch.randn(4, 12)
    with pytest.raises(ValueError, match="gram must have memory for every element, got an expanded tensor"):
        ops.gram_(torch.zeros(1, 12).expand(12, 12), torch.zeros(12), x)
    with pytest.raises(ValueError, match="total must have memory for every element"):
        ops.gram_(torch.zeros(12, 12), torch.zeros(1).expand(12), x)


def test_backend_of_what_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"operations must be a list of .*, got 'lstsq'"):
        ops.backend("cpu", "lstsq")
    with pytest.raises(ValueError, match=r"got \['foo'\]"):
        ops.backend("cpu", ["foo"])
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"there is no CUDA GPU that torch .* can use, but the device is cuda"):
            ops.backend("cuda")


def test_a_doctor_on_a_full_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(operation: str, device: str) -> dispatch.Choice:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(doctor, "choose", full)
    assert doctor._choice("gram_", "cuda:0")[0] == "undecided"
