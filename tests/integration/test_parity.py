"""The engine against the authors' steps in fp64 on raw activations: same heads, same channels, same fits, same outputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reference
import torch
from conftest import pruned, random_llama
from tolerances import assert_close

import slimllm
from slimllm.calibration import Calibration
from slimllm.config import PruneConfig
from slimllm.experiments.bench.synthetic import as_mha

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run_engine(model: Any, token_ids: torch.Tensor, config: PruneConfig) -> tuple[list[dict[str, Any]], list[Any], Any]:
    """Layer reports, removals and the pruned model."""
    model = copy.deepcopy(model).to(DEVICE)
    pruning = pruned(model, Calibration(token_ids), config)
    return pruning.reports, pruning.removals, model.to("cpu")


def check_parity(model: Any, token_ids: torch.Tensor, config: PruneConfig, keep_lowest: float = 0.0) -> None:
    layers, removals, pruned = run_engine(model, token_ids, config)
    assert sum(removal.pruned for removal in removals) >= 2
    expected = reference.prune(model, token_ids, removals, config.head_unit, keep_lowest)
    # The same plain algorithm on fp32 activations: what their rounding alone costs, in three draws of it.
    in_fp32 = [
        reference.prune(redrawn, token_ids, removals, config.head_unit, keep_lowest, dtype=torch.float32)
        for redrawn in (model, rounded_otherwise(model, 1), rounded_otherwise(model, 2))
    ]
    outputs: list[torch.Tensor] = []
    for layer in pruned.model.layers:
        layer.register_forward_hook(lambda m, a, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        pruned(token_ids)
    for index, (got, wanted, output, *plain) in enumerate(zip(layers, expected, outputs, *in_fp32, strict=True)):
        for name in ("kept_heads", "kept_kv_heads", "kept_channels"):
            if name in wanted:
                assert got[name] == wanted[name], (index, name)
                assert all(draw[name] == wanted[name] for draw in plain), "a tie, which rounding decides: no test case"
        for part, projection in (("attention", "self_attn.o_proj"), ("ffn", "mlp.down_proj")):
            if f"{part}_fit" in wanted:
                check_fit(model, pruned, index, projection, got, wanted[f"{part}_fit"], [p[f"{part}_fit"] for p in plain])
        assert_close(output, wanted["output"], [p["output"] for p in plain], floor=1e-5)


def rounded_otherwise(model: Any, seed: int) -> Any:
    """The model with every weight moved to one of its fp32 neighbours, or left: as good, but all products round anew."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            step = torch.randint(-1, 2, parameter.shape, generator=generator)
            parameter.copy_(torch.nextafter(parameter, parameter + step * parameter.abs()))
    return other


def check_fit(
    dense: Any,
    pruned: Any,
    index: int,
    projection: str,
    report: dict[str, Any],
    wanted: tuple[Any, ...],
    plain: list[tuple[Any, ...]],
) -> None:
    """a and b are found in the weights: W' = a W[:, kept], bias' = bias + b."""
    old = dense.model.layers[index].get_submodule(projection)
    new = pruned.model.layers[index].get_submodule(projection)
    kept = report["kept_channels"]
    if "o_proj" in projection:
        kept = reference.columns(report["kept_heads"], dense.config.head_dim)
    weight = old.weight[:, kept].double()
    plain_weights = [a[:, None] * weight for a, _, _ in plain]
    assert_close(new.weight, wanted[0][:, None] * weight, plain_weights, floor=1e-5)
    bias = old.bias.double() if old.bias is not None else 0.0
    assert_close(new.bias, wanted[1] + bias, [b + bias for _, b, _ in plain], floor=1e-5, scale=wanted[2])


@pytest.mark.parametrize("head_unit", ["kv-group", "query"])
@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_gqa(stories: Any, token_ids: torch.Tensor, head_unit: str, ratio: float) -> None:
    check_parity(stories, token_ids, PruneConfig(ratio, "slimllm", head_unit=head_unit))


@pytest.mark.parametrize("ratio", [0.2, 0.35, 0.5])
def test_mha(stories: Any, token_ids: torch.Tensor, ratio: float) -> None:
    check_parity(as_mha(stories), token_ids, PruneConfig(ratio, "slimllm"))


def test_paper_preset_keeps_the_lowest_percent(stories: Any, token_ids: torch.Tensor) -> None:
    check_parity(as_mha(stories), token_ids, PruneConfig(ratio=0.2, preset="paper"), keep_lowest=0.01)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_hard_statistics(seed: int, kv_heads: int) -> None:
    """Means far larger than spreads, dead and dominating channels, biases of every kind."""
    model = random_llama(seed, num_key_value_heads=kv_heads)
    token_ids = torch.randint(0, 128, (6, 40), generator=torch.Generator().manual_seed(seed))
    check_parity(model, token_ids, PruneConfig(0.4, "slimllm"))


def test_fewer_tokens_than_channels(stories: Any, token_ids: torch.Tensor) -> None:
    check_parity(stories, token_ids[:1, :50], PruneConfig(0.3, "slimllm"))


def test_greedy_search_does_exchange() -> None:
    """The parity above is worth little if no exchange ever happens."""
    from slimllm.ops import head_covariance, head_importance, pearson_greedy
    from slimllm.statistics import GramStatistics

    exchanged = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        mixing = torch.randn(32, 32, generator=generator)
        x = torch.randn(300, 32, generator=generator) @ mixing
        weight = torch.randn(24, 32, generator=generator)
        statistics = GramStatistics(32)
        statistics.update(x)
        covariance = head_covariance(weight, statistics.covariance(), 8)
        kept = pearson_greedy(covariance, 4).tolist()
        assert kept == reference.choose_heads(reference.head_outputs(x, weight, 8), 4)
        naive = head_importance(covariance).argsort()[4:].sort().values.tolist()
        exchanged += kept != naive
    assert exchanged >= 5


def test_public_function_agrees_with_the_loop(stories: Any, token_ids: torch.Tensor) -> None:
    layers, _, _ = run_engine(stories, token_ids, PruneConfig(0.3, "slimllm"))
    report = slimllm.prune_model(copy.deepcopy(stories), token_ids, PruneConfig(0.3, "slimllm"))
    assert [layer["kept_channels"] for layer in report.layers] == [layer["kept_channels"] for layer in layers]
