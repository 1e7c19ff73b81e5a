"""The engine on a GPU: the same choices as on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from least_squares import normal_equations
from tolerances import FLOOR, assert_close

import slimllm
from slimllm import PruneConfig, ops
from slimllm.methods.recovery.lstsq import LeastSquares
from slimllm.runtime.hidden_states import Placement

pytestmark = pytest.mark.gpu


def test_same_choices_as_on_a_cpu(stories_path: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    reports = {}
    for device in ("cpu", "cuda"):
        config = PruneConfig(0.3, "slimllm", calibration=token_ids, device=device, compute_dtype="float32")
        reports[device] = slimllm.prune(stories_path, tmp_path / device, config)
    assert reports["cuda"].peak_gpu_gib > 0
    for one, other in zip(reports["cpu"].layers, reports["cuda"].layers):
        assert one["kept_heads"] == other["kept_heads"] and one["kept_channels"] == other["kept_channels"]


def test_inner_activations_made_again(stories_path: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slimllm.pruning.plan.Placement", lambda **rest: Placement(**{**rest, "keep_inner_bytes": 0}))
        report = slimllm.prune(
            stories_path, tmp_path / "out", PruneConfig(0.3, "slimllm", calibration=token_ids, device="cuda")
        )
    assert report.achieved_ratio == pytest.approx(0.3, rel=0.005)


@pytest.mark.parametrize(
    "choice",
    [
        {"preset": "slimllm", "recovery": "lstsq"},
        {"preset": "best"},
        {"preset": "slimllm", "criterion": "obs"},
        {"preset": "slimllm", "criterion": "flap", "allocation": "flap", "recovery": "lstsq"},
    ],
)
def test_gram_on_the_host(stories_path: Path, token_ids: torch.Tensor, tmp_path: Path, choice: dict[str, str]) -> None:
    kept = {}
    for gram, systems in (("device", "device"), ("host", "device"), ("host", "host")):
        where = {"gram": gram, "systems": systems}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("slimllm.pruning.plan.Placement", lambda where=where, **rest: Placement(**{**rest, **where}))
            config = PruneConfig(0.3, calibration=token_ids, device="cuda", compute_dtype="float32", **choice)
            report = slimllm.prune(stories_path, tmp_path / f"{gram} {systems}", config)
        assert report.plan["gram"] == gram and report.plan["systems"] == systems
        kept[gram, systems] = [(layer["kept_channels"], layer["kept_heads"]) for layer in report.layers]
        error = report.layers[-1]["ffn_error_after"]
        assert error < report.layers[-1]["ffn_error_before"]
    assert kept["device", "device"] == kept["host", "device"] == kept["host", "host"]


def test_least_squares_in_fp32(stories_path: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    """The factor's precision does not show in the result."""
    errors = {}
    for precision in ("double", "single"):
        recovery = LeastSquares(precision=precision)
        config = PruneConfig(
            0.3, "slimllm", calibration=token_ids, device="cuda", compute_dtype="float32", recovery=recovery
        )
        report = slimllm.prune(stories_path, tmp_path / precision, config)
        errors[precision] = [layer["ffn_error_after"] for layer in report.layers if "ffn_error_after" in layer]
    assert errors["single"] == pytest.approx(errors["double"], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_unit", ["kv-group", "query"])
def test_model_in_memory(stories: Any, token_ids: torch.Tensor, dtype: torch.dtype, head_unit: str) -> None:
    model = stories.to("cuda", dtype)
    report = slimllm.prune_model(model, token_ids, PruneConfig(0.3, "slimllm", head_unit=head_unit))
    with torch.no_grad():
        assert torch.isfinite(model(token_ids[:2].cuda()).logits).all()
    assert report.device.startswith("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("batch", "k", "m"), [(1000, 16, 1), (40, 64, 16), (3, 65, 2), (5, 64, 17), (2, 300, 40), (1, 1, 1)]
)
def test_least_squares(batch: int, k: int, m: int, dtype: torch.dtype) -> None:
    """The extension's kernel, where it was built with CUDA, and torch's factorisation of what is too large for it."""
    gram, cross = normal_equations(batch, k, m, dtype=dtype)
    for ridge, absolute in ((0.0, False), (0.1, False), (2.0, True)):
        wanted, used = ops.lstsq_ex(gram.double(), cross.double(), ridge, absolute=absolute)
        got, found = ops.lstsq_ex(gram.cuda(), cross.cuda(), ridge, absolute=absolute)
        ridges = torch.full((batch,), ridge, dtype=torch.float64, device="cuda")
        once = torch.ops.slimllm.lstsq(gram.cuda(), cross.cuda(), ridges, absolute)
        assert torch.equal(once[0], got) and not once[2].any()  # at the first attempt
        assert torch.allclose(found.cpu(), used)
        assert_close(got.cpu(), wanted, wanted.to(dtype), 20 * FLOOR[dtype])


def test_bad_systems() -> None:
    gram, cross = normal_equations(20, 9, 2)
    gram[5] = torch.outer(gram[5, 0], gram[5, 0])  # of rank one
    solution, ridge = ops.lstsq_ex(gram.cuda(), cross.cuda())
    assert solution.isfinite().all() and ridge.nonzero().tolist() == [[5]]
    gram[6, 3, 3] = -1
    with pytest.raises(ValueError, match="1 of 20 systems are not positive semidefinite"):
        ops.lstsq(gram.cuda(), cross.cuda())
