"""Recovery that aims for the dense model's own residual stream, against regressions on raw activations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import slimllm
from slimllm import PruneConfig
from slimllm.methods.recovery import MEAN_PART, RIDGE

PROJECTION = {"self_attn": "self_attn.o_proj", "mlp": "mlp.down_proj"}
NORM = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}


def sublayer_of(run: Callable[[], Any], layer: Any, part: str) -> dict[str, torch.Tensor]:
    """The stream before a sub-layer, the input of its output projection, and what that puts out: (num_tokens, …) fp64."""
    found: dict[str, torch.Tensor] = {}

    def before(module: Any, inputs: Any) -> None:
        found["before"] = inputs[0].flatten(0, 1).double()

    def behind(module: Any, inputs: Any, output: Any) -> None:
        found.update(inner=inputs[0].flatten(0, 1).double(), output=output.flatten(0, 1).double())

    hooks = [
        layer.get_submodule(NORM[part]).register_forward_pre_hook(before),
        layer.get_submodule(PROJECTION[part]).register_forward_hook(behind),
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(("index", "part"), [(2, "mlp"), (3, "self_attn")])
def test_both_streams(stories: Any, token_ids: torch.Tensor, index: int, part: str) -> None:
    pruned, share = copy.deepcopy(stories), 0.6
    settings = PruneConfig(ratio=0.3, recovery="lstsq", dense_target=share, pruned_layers=5)
    report = slimllm.prune_model(pruned, token_ids, settings)
    dense = sublayer_of(lambda: stories(token_ids), stories.model.layers[index], part)
    after = sublayer_of(lambda: pruned(token_ids), pruned.model.layers[index], part)
    # The sub-layer as it was, on the pruned model's stream.
    between = copy.deepcopy(pruned)
    setattr(between.model.layers[index], part, copy.deepcopy(stories.model.layers[index].get_submodule(part)))
    own = sublayer_of(lambda: between(token_ids), between.model.layers[index], part)["output"]
    ahead = dense["before"] + dense["output"] - after["before"] - own
    assert float(ahead.norm() / own.norm()) > 0.05  # or nothing would be seen

    columns = torch.tensor(report.layers[index]["kept_channels"])
    if part == "self_attn":
        columns = (torch.tensor(report.layers[index]["kept_heads"])[:, None] * 8 + torch.arange(8)).flatten()
    weight = stories.model.layers[index].get_submodule(PROJECTION[part]).weight[:, columns].detach().double()
    z = after["inner"]
    missing = own + share * ahead - z @ weight.T
    u, e = z - z.mean(0), missing - missing.mean(0)
    size = (u.square().mean(0) + MEAN_PART * z.mean(0).square()).sqrt()
    system = (u / size).T @ (u / size) / len(z) + RIDGE * torch.eye(len(size), dtype=torch.float64)
    change = torch.linalg.solve(system, (u / size).T @ e / len(z)) / size[:, None]
    fitted = z @ weight.T + u @ change + missing.mean(0)
    kind = "attention" if part == "self_attn" else "ffn"
    variance = float((own - own.mean(0)).square().mean(0).sum())
    for when, rest in (("before", missing), ("after", own + share * ahead - after["output"])):
        error = float(rest.square().mean(0).sum()) / variance
        assert report.layers[index][f"{kind}_error_{when}"] == pytest.approx(error, rel=2e-3)
    assert torch.allclose(after["output"], fitted, rtol=1e-3, atol=1e-3 * float(fitted.std()))
