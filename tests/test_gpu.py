"""The engine on a GPU: the same choices as on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import slimllm
from slimllm import PruneConfig

pytestmark = pytest.mark.gpu


def test_same_choices_as_on_a_cpu(stories_path: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    reports = {}
    for device in ("cpu", "cuda"):
        config = PruneConfig(ratio=0.3, calibration=token_ids, device=device, compute_dtype="float32")
        reports[device] = slimllm.prune(stories_path, tmp_path / device, config)
    assert reports["cuda"].peak_gpu_gib > 0
    for one, other in zip(reports["cpu"].layers, reports["cuda"].layers):
        assert one["kept_heads"] == other["kept_heads"] and one["kept_channels"] == other["kept_channels"]


def test_inner_activations_made_again(stories_path: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slimllm.layer.KEEP_INNER_BYTES", 0)
        report = slimllm.prune(stories_path, tmp_path / "out", PruneConfig(ratio=0.3, calibration=token_ids, device="cuda"))
    assert report.achieved_ratio == pytest.approx(0.3, rel=0.005)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_unit", ["kv-group", "query"])
def test_model_in_memory(stories: Any, token_ids: torch.Tensor, dtype: torch.dtype, head_unit: str) -> None:
    model = stories.to("cuda", dtype)
    report = slimllm.prune_model(model, token_ids, PruneConfig(ratio=0.3, head_unit=head_unit))
    with torch.no_grad():
        assert torch.isfinite(model(token_ids[:2].cuda()).logits).all()
    assert report.device.startswith("cuda")
