"""Mixtures of experts: every expert is pruned as an FFN of the tokens that are routed to it, and the result loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORIES, contents, logits, stop_at
from processes import results
from safetensors.torch import load_file, save_file
from tiny_models import IDS, MIXTURES, saved, tiny
from torch.nn.functional import linear, silu
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, PreTrainedModel

import slimllm
from slimllm import InputError, PruneConfig
from slimllm.checkpoints.journal import Journal
from slimllm.checkpoints.opening import open_checkpoint
from slimllm.checkpoints.source import CheckpointModel
from slimllm.experiments.bench.forecast import forecast
from slimllm.experiments.compare import compare
from slimllm.export.api import export
from slimllm.finetuning import finetune
from slimllm.methods.elimination import eliminate_channels
from slimllm.methods.recovery.lstsq import refit_kept
from slimllm.methods.surgeon import Surgeon
from slimllm.models.families import family_of
from slimllm.models.mixture import route
from slimllm.models.sublayer import Sublayer
from slimllm.pruning.experts import ExpertStatistics
from slimllm.runtime.hidden_states import Placement


@pytest.fixture(params=sorted(MIXTURES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def settings(**changes: Any) -> PruneConfig:
    return PruneConfig(**{"ratio": 0.3, "preset": "best", "calibration": IDS, "round_to": 8, **changes})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_the_engine_computes_what_the_model_does(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    report = slimllm.prune(saved(model, tmp_path / "dense"), tmp_path / "out", settings())
    used = IDS[: report.calibration["perplexity_tokens"] // IDS.shape[1]]
    with torch.no_grad():
        assert report.calibration["perplexity_dense"] == pytest.approx(model(used, labels=used).loss.exp().item(), rel=1e-4)
        pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        loss = pruned(used, labels=used).loss
    assert report.calibration["perplexity_pruned"] == pytest.approx(loss.exp().item(), rel=1e-4)
    assert report.achieved_ratio == pytest.approx(0.3, rel=0.06) and report.format == f"slim_{family}"
    counted = sum(one.numel() for name, one in pruned.state_dict().items() if ".layers." in name)
    assert counted == sum(layer["parameters_after"] for layer in report.layers)
    prompt = {"input_ids": IDS[:2, :12], "attention_mask": torch.ones(2, 12, dtype=torch.int64)}
    how: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
    assert torch.equal(pruned.generate(**prompt, **how), pruned.generate(**prompt, use_cache=False, **how))
    again = slimllm.prune(tmp_path / "out", tmp_path / "again", settings(ratio=0.2))
    assert again.achieved_ratio == pytest.approx(0.2, rel=0.15)


def test_router_norms_and_embeddings_stay(family: str, tmp_path: Path) -> None:
    slimllm.prune(saved(tiny(family), tmp_path / "dense"), tmp_path / "out", settings(ratio=0.5))
    before, after = (tensors(tmp_path / name) for name in ("dense", "out"))
    others = [name for name in before if ".experts." not in name and "_proj" not in name]
    assert any(name.endswith(".gate.weight") for name in others)
    assert all(torch.equal(before[name], after[name]) for name in others)


def routed(model: PreTrainedModel, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """By hand, of a dense model: the stream before a layer's FFN, its norm's output, gates of all experts, and logits."""
    found: list[torch.Tensor] = []
    block = model.model.layers[layer]
    hook = block.post_attention_layernorm.register_forward_hook(lambda m, a, out: found.extend([a[0], out]))
    logits(model, IDS)
    hook.remove()
    stream, x = (one.flatten(0, 1).double() for one in found)
    scores = x @ block.mlp.gate.weight.double().T
    top = scores.softmax(-1).topk(model.config.num_experts_per_tok, -1)
    normalised = model.config.model_type == "mixtral" or model.config.norm_topk_prob
    values = top.values / top.values.sum(-1, keepdim=True) if normalised else top.values
    return stream, x, torch.zeros_like(scores).scatter(-1, top.indices, values), scores


@pytest.mark.parametrize(("weighted", "gram"), [(False, "device"), (True, "device"), (True, "host"), (True, "disk")])
@pytest.mark.parametrize("normalised", [True, False])
def test_statistics_against_fp64(family: str, tmp_path: Path, weighted: bool, gram: str, normalised: bool) -> None:
    """The Gram of every expert: its own tokens, with the squares of their gates, and of the stream's size or not."""
    if family == "mixtral" and not normalised:
        pytest.skip("its gates always sum to 1")
    model = tiny(family, **({"norm_topk_prob": normalised} if family == "qwen3_moe" else {}))
    placement = Placement(gram=gram, folder=tmp_path)
    source = CheckpointModel(open_checkpoint(saved(model, tmp_path / "dense")), torch.device("cpu"), torch.float32)
    layer = source.place(1, source.weights(1))
    ffn = Sublayer.ffn_of(layer, 1)
    stream, x, gates, _ = routed(model, 1)
    statistics = ExpertStatistics(ffn, placement, weighted)
    for start in range(0, len(x), 100):
        some = slice(start, start + 100)
        parts, output = route(ffn, x[some].float())
        statistics.update(parts, x[some].float(), ffn.token_weights(stream[some].float()[None], output))
    assert statistics.tokens == len(x)
    specs = family_of(family).by_expert(layer.tensors)
    inner, output = [], torch.zeros_like(x)
    for number, spec in enumerate(specs):
        gate, up, down = (layer.tensors[f"{name}.weight"].double() for name in spec.ffn_projections)
        inner.append(silu(linear(x, gate)) * linear(x, up))
        output += gates[:, number, None] * linear(inner[-1], down)
    own = 1 / (stream + output).square().mean(-1) if weighted else torch.ones(len(x), dtype=torch.float64)
    for number, z in enumerate(inner):
        weight = gates[:, number].square() * own
        found = statistics.gram(number)
        assert found.count == int((gates[:, number] > 0).sum())
        assert found.mass == pytest.approx(float(weight.sum()), rel=1e-4)
        wanted = (z * weight[:, None]).T @ z / weight.sum()
        torch.testing.assert_close(found.about_zero().covariance(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.max()))


def test_an_expert_is_pruned_as_a_dense_ffn_is(family: str, tmp_path: Path) -> None:
    """The first layer's experts, by the elimination and the regression called by hand on Grams made by hand."""
    model = tiny(family)
    changes = {"allocation": "uniform", "token_weights": "none", "ratio": 0.4, "head_unit": "kv-group"}
    slimllm.prune(saved(model, tmp_path / "dense"), tmp_path / "out", settings(**changes))
    dense, pruned = (tensors(tmp_path / name) for name in ("dense", "out"))
    between = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")  # the FFN as it was, behind the pruned attention
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    between.model.layers[0].self_attn = native.model.layers[0].self_attn
    _, x, gates, _ = routed(between, 0)
    spec = family_of(family)
    for number, one in enumerate(spec.by_expert(name.removeprefix("model.layers.0.") for name in dense)):
        gate, up, down = (f"model.layers.0.{name}.weight" for name in one.ffn_projections)
        tokens = gates[:, number] > 0
        z = silu(linear(x[tokens], dense[gate].double())) * linear(x[tokens], dense[up].double())
        from slimllm.statistics import GramStatistics

        gram = GramStatistics(z.shape[1])
        gram.update(z.float(), gates[tokens, number].square().float())
        gone = z.shape[1] - len(pruned[gate])
        order = eliminate_channels(Surgeon(dense[down], gram.about_zero()), gone).order
        kept = torch.ones(z.shape[1], dtype=torch.bool).index_fill_(0, order, False).nonzero()[:, 0]
        assert torch.equal(pruned[gate], dense[gate][kept]) and torch.equal(pruned[up], dense[up][kept])
        change = refit_kept(dense[down], gram.about_zero(), kept).change
        assert change.delta is not None
        torch.testing.assert_close(pruned[down], (dense[down][:, kept] + change.delta).float(), rtol=1e-2, atol=1e-3)


def of_stories(folder: Path, experts: int = 4) -> Path:
    """The trained model as a mixture of copies of its FFNs, which is the same function, with tokens divided at random."""
    dense = AutoModelForCausalLM.from_pretrained(STORIES)
    config = dense.config
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, tensor in tensors(STORIES).items():
        before, _, last = name.partition(".mlp.")
        if not last:
            found[name] = tensor
            continue
        own = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[last.split(".")[0]]
        for number in range(experts):
            found[f"{before}.block_sparse_moe.experts.{number}.{own}.weight"] = tensor.clone()
        gate = torch.randn(experts, config.hidden_size, generator=generator)
        found[f"{before}.block_sparse_moe.gate.weight"] = gate
    names = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "max_position_embeddings",
        "rope_parameters",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
    ]
    mixture = MixtralConfig(
        **{name: getattr(config, name) for name in names}, num_local_experts=experts, num_experts_per_tok=2
    )
    mixture.architectures = ["MixtralForCausalLM"]
    folder.mkdir()
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    mixture.save_pretrained(folder)
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return of_stories(tmp_path_factory.mktemp("stories") / "mixture")


def test_of_a_trained_model_little_is_lost(stories: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    """Less than by the size of weights, and less than of the dense model, whose FFN serves all tokens."""
    found = {}
    for name, model, changes in (
        ("best", stories, {}),
        ("magnitude", stories, {"criterion": "magnitude", "recovery": "none", "allocation": "uniform"}),
        ("dense", STORIES, {"bias": "no"}),
    ):
        given = {"ratio": 0.3, "preset": "best", "calibration": token_ids, **changes}
        report = slimllm.prune(model, tmp_path / name, PruneConfig(**given))
        calibration = report.calibration
        found[name] = calibration["perplexity_pruned"] / calibration["perplexity_dense"]
    assert found["best"] < found["dense"] < found["magnitude"]


def test_an_expert_without_tokens(tmp_path: Path) -> None:
    """Its channels with the smallest weights go, and the report counts its tokens."""
    model = tiny("mixtral", num_local_experts=5)
    with torch.no_grad():
        for layer in model.model.layers:  # for every token, two of the first four are above the last
            one, other, *_ = layer.mlp.gate.weight.clone()
            layer.mlp.gate.weight.copy_(torch.stack([one, -one, other, -other, torch.zeros_like(one)]))
    report = slimllm.prune(saved(model, tmp_path / "dense"), tmp_path / "out", settings(allocation="uniform"))
    counts = [layer["expert_tokens"] for layer in report.layers]
    assert {sum(count) for count in counts} == {2 * IDS.numel()}
    assert any("4 of 20 experts saw no calibration tokens" in note for note in report.allocation["notes"])
    before, after = (tensors(tmp_path / name) for name in ("dense", "out"))
    assert all(count[4] == 0 and min(count[:4]) > 0 for count in counts)
    for index in range(4):
        w1, w3, w2 = (f"model.layers.{index}.block_sparse_moe.experts.4.{name}.weight" for name in ("w1", "w3", "w2"))
        size = before[w1].square().sum(1) + before[w3].square().sum(1) + before[w2].square().sum(0)
        kept = size.topk(len(after[w1])).indices.sort().values
        assert torch.equal(after[w1], before[w1][kept]) and torch.equal(after[w2], before[w2][:, kept])


@pytest.mark.parametrize("program", ["transformers", "vllm"])
def test_for_a_program_it_is_the_family_itself(family: str, tmp_path: Path, program: str) -> None:
    dense = saved(tiny(family), tmp_path / "dense")
    report = slimllm.prune(dense, tmp_path / "out", settings(program=program, round_to=None))
    assert report.format == family and not list((tmp_path / "out").glob("*.py"))
    assert {layer["intermediate_size"] % 8 for layer in report.layers} == {0}
    loaded, about = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not (about["missing_keys"] or about["unexpected_keys"] or about["mismatched_keys"])
    used = IDS[: report.calibration["perplexity_tokens"] // IDS.shape[1]]
    with torch.no_grad():
        loss = loaded(used, labels=used).loss
    assert report.calibration["perplexity_pruned"] == pytest.approx(loss.exp().item(), rel=1e-4)


def test_padded_it_is_the_family_itself(family: str, tmp_path: Path) -> None:
    slimllm.prune(saved(tiny(family), tmp_path / "dense"), tmp_path / "out", settings(bias="no"))
    export(tmp_path / "out", tmp_path / "padded", "padded")
    native, padded = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "padded"),
    )
    assert padded.config.model_type == family and torch.allclose(logits(native, IDS), logits(padded, IDS), atol=1e-4)


@pytest.mark.parametrize(("stage", "layer"), [("dense", 1), ("prune", 1)])
def test_goes_on_where_it_was(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, layer: int) -> None:
    monkeypatch.setattr(Journal, "ready", True)
    dense = saved(tiny(family), tmp_path / "dense")
    slimllm.prune(dense, tmp_path / "whole", settings(), command="the command")
    with pytest.raises(KeyboardInterrupt):
        slimllm.prune(
            dense, tmp_path / "out", settings(), progress=stop_at(stage, layer), command="the command", resume=True
        )
    report = slimllm.prune(dense, tmp_path / "out", settings(), command="the command", resume=True)
    assert report.resumed_steps > 0 and contents(tmp_path / "out") == contents(tmp_path / "whole")


def _perplexity(group: Any, model: str, out: str) -> list[float]:
    report = slimllm.prune(model, out, settings(ratio=0.5), group=group)
    return [report.calibration["perplexity_pruned"], *(count for one in report.layers for count in one["expert_tokens"])]


def test_several_processes(tmp_path: Path) -> None:
    dense = saved(tiny("qwen3_moe"), tmp_path / "dense")
    alone = slimllm.prune(dense, tmp_path / "alone", settings(ratio=0.5))
    counts = [count for layer in alone.layers for count in layer["expert_tokens"]]
    found = results(_perplexity, 2, tmp_path / "world", str(dense), str(tmp_path / "out"))
    assert found == [[pytest.approx(alone.calibration["perplexity_pruned"], rel=1e-4), *counts]] * 2
    one, other = tensors(tmp_path / "alone"), tensors(tmp_path / "out")
    assert all(torch.allclose(one[name], other[name], atol=1e-3) for name in one)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"preset": "paper", "round_to": None}, "recovery affine adds biases.*experts.*give lstsq or none"),
        ({"recovery": "bias"}, "recovery bias adds biases"),
        ({"criterion": "flap", "recovery": "none"}, "criterion flap prunes by statistics of the dense model"),
        ({"allocation": "flap"}, "allocation flap compares the channels of one FFN"),
        ({"round_to": 12}, "multiples of 8"),
        ({"program": "llama.cpp"}, "cannot be written as GGUF"),
    ],
)
def test_what_experts_have_no_place_for_is_refused(
    family: str, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    dense = saved(tiny(family), tmp_path / "dense")
    with pytest.raises(InputError, match=sentence):
        slimllm.prune(dense, tmp_path / "out", settings(**changes))
    assert not (tmp_path / "out").exists()


def test_in_memory_it_is_refused(family: str) -> None:
    model = tiny(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match="experts of a layer in one tensor"):
        slimllm.prune_model(model, IDS, PruneConfig(0.3))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_layers_without_experts_and_odd_experts_are_refused(tmp_path: Path) -> None:
    dense = saved(tiny("qwen3_moe", mlp_only_layers=[1]), tmp_path / "dense")
    with pytest.raises(InputError, match="Some layers of the model have no experts"):
        slimllm.prune(dense, tmp_path / "out", settings())
    other = saved(tiny("mixtral"), tmp_path / "other")
    found = tensors(other)
    name = "model.layers.2.block_sparse_moe.experts.1.w2.weight"
    save_file({**found, name: found[name][:, :-1].contiguous()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        slimllm.prune(other, tmp_path / "out", settings())
    with pytest.raises(InputError, match="there have to be at least two"):
        one = saved(tiny("mixtral", num_local_experts=1, num_experts_per_tok=1), tmp_path / "one")
        slimllm.prune(one, tmp_path / "out", settings())
    tiny("mixtral").save_pretrained(tmp_path / "fused", save_original_format=False)
    with pytest.raises(InputError, match="has the experts in one tensor"):
        slimllm.prune(tmp_path / "fused", tmp_path / "out", settings())


def test_other_commands(tmp_path: Path) -> None:
    dense = saved(tiny("qwen3_moe", vocab_size=512), tmp_path / "dense")
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(dense)
    (tmp_path / "data.txt").write_text("Once upon a time there was a house. " * 400)
    for settings_of in ({"preset": "paper"}, {"round_to": 12}):
        with pytest.raises(InputError, match="experts of"):
            forecast(str(dense), PruneConfig(0.2, **settings_of))
    with pytest.raises(InputError, match="mixture of experts, whose training is not supported"):
        finetune(dense, tmp_path / "data.txt", tmp_path / "tuned")
    text = torch.randint(3, 500, (600,), generator=torch.Generator().manual_seed(0))
    lines = compare(dense, [0.3], PruneConfig(0.3, samples=8, seq_len=32), text, max_windows=2)
    assert {line.method for line in lines} >= {"dense", "best", "magnitude", "random"}
    assert not {line.method for line in lines} & {"slimllm", "flap"}


def test_the_loss_with_labels_and_routers_logits(family: str, tmp_path: Path) -> None:
    """A configuration that asks for the router's logits, which the native format does not have."""
    dense = saved(tiny(family, output_router_logits=True), tmp_path / "dense")
    slimllm.prune(dense, tmp_path / "out", settings())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert bool(model(IDS, labels=IDS).loss.isfinite())


def test_in_half_precision(family: str, tmp_path: Path) -> None:
    dense = tiny(family).to(torch.bfloat16)
    slimllm.prune(saved(dense, tmp_path / "dense"), tmp_path / "out", settings(compute_dtype="bfloat16", ratio=0.1))
    kind = {"dtype": torch.bfloat16}
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name, **kind) for name in ("dense", "out"))
    assert after.dtype == torch.bfloat16
    between = torch.nn.functional.cosine_similarity(logits(before, IDS).float(), logits(after, IDS).float(), dim=-1)
    assert float(between.mean()) > 0.9


def test_memory_is_that_of_all_grams_and_one_elimination(tmp_path: Path) -> None:
    """A mixture of the sizes of Qwen3-30B-A3B, from its configuration alone."""
    sizes = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
    more = {"moe_intermediate_size": 768, "num_local_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48}
    config = tiny("qwen3_moe").config.to_dict() | sizes | more | {"vocab_size": 151936, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = forecast(str(tmp_path), PruneConfig(0.2), for_gpu=True)
    assert found.plan.config.samples * found.plan.config.seq_len == 4 * 768 * 128 // 8
    grams = 128 * 768**2 * 4
    assert found.plan.gpu["Gram"] == pytest.approx(grams, rel=0.3) and found.seconds is None
    assert 28e9 < found.params < 32e9
