"""Other people's methods in examples/, against plain implementations on raw fp64 activations."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_llama

from slimllm.statistics import ColumnStatistics, GramStatistics

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = ("wanda_sp", "flap", "slicegpt")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@torch.no_grad()
def raw_inputs(model: Any, token_ids: torch.Tensor, suffix: str) -> dict[str, torch.Tensor]:
    """All tokens' inputs of the modules, (num_tokens, features) fp64."""
    found: dict[str, list[torch.Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, x, name=name: found.setdefault(name, []).append(x[0].flatten(0, -2)))
        for name, module in model.named_modules()
        if name.endswith(suffix)
    ]
    model(token_ids)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(batches).double() for name, batches in found.items()}


def test_wanda_sp(example: Any, stories: Any, token_ids: torch.Tensor) -> None:
    wanda_sp = example("wanda_sp")
    raw = raw_inputs(stories, token_ids, "mlp.down_proj")
    weights = {name: stories.get_submodule(name).weight.detach().clone() for name in raw}
    with torch.no_grad():
        statistics = wanda_sp.input_statistics(stories, token_ids, "mlp.down_proj", ColumnStatistics)
        assert statistics.keys() == raw.keys() and len(raw) == 5
        for name, x in raw.items():
            metric = weights[name].abs().double() * torch.linalg.vector_norm(x, dim=0)  # (D, I), Wanda's own
            got = wanda_sp.wanda_sp(weights[name], statistics[name])
            assert torch.allclose(got, metric.mean(0), rtol=1e-5)
        wanda_sp.prune(stories, token_ids, ratio=0.25)
    for name, x in raw.items():
        metric = (weights[name].abs().double() * torch.linalg.vector_norm(x, dim=0)).mean(0)
        keep = metric.topk(129).indices.sort().values
        assert torch.equal(stories.get_submodule(name).weight, weights[name][:, keep])


def test_flap(example: Any, stories: Any, token_ids: torch.Tensor) -> None:
    flap = example("flap")
    raw = raw_inputs(stories, token_ids, "mlp.down_proj")
    weights = {name: stories.get_submodule(name).weight.detach().clone() for name in raw}
    metric = {name: x.var(0) * weights[name].double().square().sum(0) for name, x in raw.items()}
    standard = {name: (score - score.mean()) / score.std() for name, score in metric.items()}
    threshold = torch.cat(list(standard.values())).sort().values[172]  # a fifth of 5 · 172
    with torch.no_grad():
        flap.prune(stories, token_ids, ratio=0.2)
    left = 0
    for name, x in raw.items():
        keep = standard[name] >= threshold
        down = stories.get_submodule(name)
        assert torch.equal(down.weight, weights[name][:, keep])
        bias = (x * ~keep).mean(0) @ weights[name].double().T
        assert torch.allclose(down.bias.double(), bias, atol=1e-6)
        left += int(keep.sum())
    assert left == 4 * 172


def test_slicegpt(example: Any, stories: Any, token_ids: torch.Tensor) -> None:
    slicegpt = example("slicegpt")
    raw = raw_inputs(stories, token_ids, "mlp.gate_proj")
    statistics = slicegpt.input_statistics(stories, token_ids, "mlp.gate_proj", GramStatistics)
    for name, x in raw.items():
        directions, fraction = slicegpt.principal_directions(statistics[name], 40)
        singular = torch.linalg.svd(x, full_matrices=False)
        wanted = singular.Vh[:40].T @ singular.Vh[:40]  # the projection, which no choice of signs changes
        assert torch.allclose(directions @ directions.T, wanted, atol=1e-4)
        assert fraction == pytest.approx(float(singular.S[:40].square().sum() / singular.S.square().sum()), abs=1e-6)
    with torch.no_grad():
        before = stories(token_ids).logits
        slicegpt.prune(stories, token_ids, ratio=0.0)  # all directions: a rotation, and the same model
        assert torch.allclose(stories(token_ids).logits, before, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_runs(example: Any, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module = example(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    module.run(module.prune)
    match = re.search(r"perplexity ([\d.]+) -> ([\d.]+)", capsys.readouterr().out)
    assert match and float(match[1]) < float(match[2]) < 1.5 * float(match[1])


@pytest.mark.parametrize("name", ["wanda_sp", "flap"])
def test_biases_are_kept(example: Any, name: str, token_ids: torch.Tensor) -> None:
    model = random_llama(0)
    old = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        before = model(token_ids % 128).logits
        example(name).prune(model, token_ids % 128, ratio=0.0)
        assert torch.allclose(model(token_ids % 128).logits, before, atol=1e-3)
        example(name).prune(model, token_ids % 128, ratio=0.25)
        assert torch.isfinite(model(token_ids % 128).logits).all()
    assert model.model.layers[0].mlp.gate_proj.bias.shape < old["model.layers.0.mlp.gate_proj.bias"].shape


def test_a_model_that_is_not_there(
    example: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = example("wanda_sp")
    monkeypatch.setattr(sys, "argv", ["wanda_sp.py", "/no/such/model"])
    with pytest.raises(SystemExit) as stopped:
        module.run(module.prune)
    assert stopped.value.code == 2 and "no folder or file /no/such/model" in capsys.readouterr().err
