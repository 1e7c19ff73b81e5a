"""Triton kernels against fp64: on a GPU, or under the interpreter where there is none."""

from __future__ import annotations

import pytest
import torch
from tolerances import FLOOR, assert_close

from slimllm import InputError, ops

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
    with pytest.raises(TypeError, match="floating"):
        ops.gram_(gram, total, torch.zeros(5, 3, dtype=torch.int64))


def test_backend_is_chosen_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMLLM_BACKEND", "auto")
    assert ops.backend("cpu") == "torch"
    monkeypatch.setenv("SLIMLLM_BACKEND", "cublas")
    with pytest.raises(InputError, match="must be one of auto, torch, triton, got 'cublas'"):
        ops.backend("cpu")
    monkeypatch.setenv("SLIMLLM_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(InputError, match="needs a GPU"):
        ops.backend("cpu")


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
