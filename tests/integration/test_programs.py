"""Results for a program (`--for`): it loads them without code of slimllm's, and what it cannot load is refused at once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import pytest
import torch
from conftest import STORIES
from tiny_models import IDS, LIKE_LLAMA_CPP, saved, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import slimllm
from slimllm import InputError, PruneConfig
from slimllm.cli import app
from slimllm.errors import OutputError
from slimllm.experiments.bench.forecast import forecast
from slimllm.export import gguf as export_gguf
from slimllm.export.api import export
from slimllm.methods.allocation.removal import LayerShape
from slimllm.methods.allocation.rounding import default_rounding
from slimllm.models.families import FAMILIES


def pruned(source: Path, out: Path, **settings: Any) -> str:
    given: dict[str, Any] = {"ratio": 0.3, "preset": "slimllm", "calibration": IDS, **settings}
    return slimllm.prune(source, out, PruneConfig(**given)).format


@pytest.mark.parametrize("program", ["transformers", "vllm"])
@pytest.mark.parametrize("settings", [{}, {"preset": "best"}, {"recovery": "none"}])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "opt"])
def test_no_code_of_ours(family: str, settings: dict[str, Any], program: str, tmp_path: Path) -> None:
    changes = {"attention_bias": False, "mlp_bias": False} if family == "llama" else {}
    form = pruned(saved(tiny(family, **changes), tmp_path / "dense"), tmp_path / "out", program=program, **settings)
    as_llama = family == "llama" and program == "transformers" and settings != {"recovery": "none"}
    assert form == ("seed_oss" if as_llama else family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in tiny(family, **changes).parameters())


def test_numbers_of_heads_that_the_architecture_takes(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    source = saved(tiny("gemma3_text", **sizes), tmp_path / "dense")
    for ratio in (0.1, 0.25, 0.45, 0.6):
        pruned(source, tmp_path / str(ratio), program="vllm", ratio=ratio)
        written = json.loads((tmp_path / str(ratio) / "config.json").read_text())
        assert written["model_type"] == "gemma3_text" and 64 % written["num_attention_heads"] == 0
        report = json.loads((tmp_path / str(ratio) / "report.json").read_text())
        assert report["achieved_ratio"] == pytest.approx(ratio, rel=0.12)


def test_a_llama_of_any_number_of_heads(tmp_path: Path) -> None:
    changes = {"attention_bias": False, "mlp_bias": False, "num_attention_heads": 8, "num_key_value_heads": 8}
    source = saved(tiny("llama", **changes), tmp_path / "dense")
    assert pruned(source, tmp_path / "out", program="vllm") in ("llama", "seed_oss")
    names = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert not [name for name in names if name.endswith(".bias")]


@pytest.mark.parametrize("settings", [{}, {"preset": "best"}, {"head_unit": "query"}])
@pytest.mark.parametrize("family", list(LIKE_LLAMA_CPP))
def test_gguf_can_be_written(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    source = saved(tiny(family, vocab_size=512, **LIKE_LLAMA_CPP[family]), tmp_path / "dense")
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(source)
    pruned(source, tmp_path / "out", program="llama.cpp", **settings)
    assert export(tmp_path / "out", tmp_path / "m.gguf", "gguf") == {"llama": "deci", "mistral": "deci"}.get(
        family, family.removesuffix("_text")
    )


def test_heads_stay_where_llama_cpp_has_no_place_for_their_biases(tmp_path: Path, told: list[str]) -> None:
    changes = {"use_sliding_window": False, "sliding_window": None, "layer_types": None, "hidden_size": 96}
    source = saved(tiny("qwen2", **changes), tmp_path / "dense")
    pruned(source, tmp_path / "out", program="llama.cpp")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {layer["num_heads"] for layer in report["layers"]} == {6}
    assert report["achieved_ratio"] == pytest.approx(0.3, rel=0.06)
    assert "For llama.cpp: no heads are removed, since llama.cpp reads qwen2 with all of them only." in told


@pytest.mark.parametrize(
    ("family", "settings", "sentence"),
    [
        ("bloom", {"program": "transformers"}, "transformers computes the slopes of bloom's position bias"),
        ("bloom", {"program": "llama.cpp"}, "This bloom model cannot be written as GGUF"),
        ("opt", {"program": "llama.cpp"}, "This opt model cannot be written as GGUF"),
        ("gemma2", {"program": "llama.cpp"}, "This gemma2 model cannot be written as GGUF: llama.cpp divides"),
        (
            "qwen3",
            {"program": "vllm", "recovery": "bias"},
            "The recovery is bias, but vLLM has no place for its biases in qwen3",
        ),
        ("qwen3", {"program": "vllm", "bias": "yes"}, "bias is yes, but vLLM has no place for a bias in qwen3"),
        (
            "qwen3",
            {"program": "vllm", "allocation": "auto"},
            "The allocation is auto, but vLLM reads qwen3 with the same size",
        ),
        ("qwen3", {"program": "vllm", "preset": "paper"}, "The preset paper has the allocation layer-importance, but vLLM"),
        ("qwen3", {"program": "ollama"}, "program must be one of transformers, vllm, llama.cpp"),
    ],
)
def test_what_cannot_be_loaded_is_refused_at_once(
    family: str, settings: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    source = saved(tiny(family), tmp_path / "dense")
    with pytest.raises(InputError) as error:
        pruned(source, tmp_path / "out", **settings)
    assert str(error.value).startswith(sentence)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_the_published_settings_can_be_for_llama_cpp(tmp_path: Path) -> None:
    source = saved(tiny("llama", attention_bias=False, mlp_bias=False), tmp_path / "dense")
    shards = []
    for name, program in (("with", "llama.cpp"), ("without", None)):
        pruned(source, tmp_path / name, preset="paper", program=program)
        shards.append([file.read_bytes() for file in sorted((tmp_path / name).glob("*.safetensors"))])
    assert shards[0] == shards[1]


def test_one_command(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [
        "prune",
        str(STORIES),
        "--out",
        str(out),
        "--ratio",
        "0.3",
        "--samples",
        "4",
        "--for",
        "llama.cpp",
        "--no-page",
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    fields = gguf.GGUFReader(out / "model.gguf").fields
    assert fields["general.architecture"].contents() == "deci"
    assert f"{out}/model.gguf, for llama.cpp" in result.output.replace("\n", "")
    slimllm.load(out)  # the file beside the shards does not disturb


def test_a_tokenizer_without_gguf_is_refused_before_pruning(tmp_path: Path) -> None:
    source = saved(tiny("llama", vocab_size=600, attention_bias=False, mlp_bias=False), tmp_path / "dense")
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(source)
    path = source / "tokenizer.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps(described | {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}))
    command = ["prune", str(source), "--out", str(tmp_path / "out"), "--ratio", "0.3", "--for", "llama.cpp"]
    result = CliRunner().invoke(app, command)
    assert "The tokenizer is of type WordLevel" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_again_over_its_own_result(tmp_path: Path) -> None:
    command = ["prune", str(STORIES), "--out", str(tmp_path / "out"), "--ratio", "0.3", "--samples", "4", "--no-page"]
    file = tmp_path / "out" / "model.gguf"
    for more in (["--overwrite"], ["--resume"], []):
        result = CliRunner().invoke(app, [*command, "--for", "llama.cpp", *more])
        assert (result.exit_code == 0) == (more != []), result.output
    assert CliRunner().invoke(app, [*command, "--overwrite"]).exit_code == 0 and not file.exists()
    file.write_text("mine")
    result = CliRunner().invoke(app, [*command, "--for", "llama.cpp", "--overwrite"])
    assert "holds model.gguf, which slimllm has not written" in str(result.exception) and file.read_text() == "mine"


def test_a_gguf_file_that_cannot_be_written_does_not_cost_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> str:
        raise OutputError("The disk is full.")

    monkeypatch.setattr("slimllm.export.api.export", full)
    command = ["prune", str(STORIES), "--out", str(tmp_path / "out"), "--ratio", "0.3", "--ratio", "0.4", "--samples", "4"]
    result = CliRunner().invoke(app, [*command, "--for", "llama.cpp"])
    for ratio in ("0.3", "0.4"):
        assert (tmp_path / "out" / ratio / "report.html").is_file()
        assert f"slimllm export {tmp_path}/out/{ratio} --to gguf --out" in str(result.exception)


def test_heads_that_vllm_does_not_take(tmp_path: Path) -> None:
    """It computes the size of Qwen 2's heads from their number, which transformers does not."""
    changes = {"use_sliding_window": False, "sliding_window": None, "layer_types": None, "hidden_size": 96}
    source = saved(tiny("qwen2", **changes), tmp_path / "dense")
    pruned(source, tmp_path / "out", program="vllm")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {layer["num_heads"] for layer in report["layers"]} == {6}


def test_a_model_that_was_pruned_before(tmp_path: Path) -> None:
    source = saved(tiny("qwen3", attention_bias=False), tmp_path / "dense")
    pruned(source, tmp_path / "uneven", recovery="lstsq", bias="no")
    with pytest.raises(InputError, match="with the same size in all layers, but the layers of this model differ"):
        pruned(tmp_path / "uneven", tmp_path / "out", program="vllm", ratio=0.2)
    pruned(source, tmp_path / "biased", allocation="uniform")
    with pytest.raises(InputError, match="The model has biases that vLLM has no place for in qwen3"):
        pruned(tmp_path / "biased", tmp_path / "out", program="vllm", ratio=0.2)


def test_a_rotary_embedding_that_gguf_cannot_store(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    source = saved(tiny("llama", attention_bias=False, mlp_bias=False, rope_parameters=rope), tmp_path / "dense")
    with pytest.raises(InputError, match="scaled by the rule 'yarn' cannot be written to GGUF"):
        pruned(source, tmp_path / "out", program="llama.cpp")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_the_plan_says_what_follows() -> None:
    notes = forecast("llama-7b", PruneConfig(0.2, "slimllm", program="vllm"), for_gpu=True).notes
    assert [note.split(",")[0] for note in notes] == [
        "For vLLM: all layers lose the same",
        "For vLLM: the recovery is lstsq without biases",
    ]
    notes = forecast("llama-7b", PruneConfig(ratio=0.2, program="vllm"), for_gpu=True).notes
    assert [note.split(",")[0] for note in notes] == ["For vLLM: all layers lose the same", "For vLLM: no biases are added"]
    assert not forecast("llama-7b", PruneConfig(ratio=0.2, program="llama.cpp"), for_gpu=True).notes
    assert forecast("llama-7b", PruneConfig(ratio=0.2), for_gpu=True).plan.config.bias == "yes"


def test_in_memory() -> None:
    model = tiny("qwen3")
    report = slimllm.prune_model(model, IDS, PruneConfig(0.3, "slimllm", program="transformers"))
    assert (report.format, report.config["bias"], report.config["recovery"]) == ("qwen3", "no", "lstsq")


@pytest.mark.parametrize(("program", "step", "by_three"), [(None, 4, 6), ("vllm", 16, 48), ("llama.cpp", 32, 3)])
def test_widths_that_the_program_can_quantise(program: str | None, step: int, by_three: int) -> None:
    smollm2 = LayerShape(3, 294_912, 1536, 1728, 3_540_096, 0, 0, True)
    powers = PruneConfig(0.3, "slimllm", program=program).roundings
    assert default_rounding(1_062_029, [smollm2], 1, powers) == step
    assert default_rounding(1_062_029, [smollm2], 3, powers) == by_three
    narrow = dataclasses.replace(smollm2, channels=500)
    assert default_rounding(1_062_029, [narrow], 1, powers) == (1 if program else 4)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_gguf_of_the_family_is_read_again(family: str, tmp_path: Path) -> None:
    """The same configuration, tensors and logits as the folder that it was written from, and pruned again as that is."""
    changes = LIKE_LLAMA_CPP.get(family) or {"use_sliding_window": False, "sliding_window": None, "layer_types": None}
    source = saved(tiny(family, vocab_size=512, hidden_size=96, **changes), tmp_path / "dense")
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(source)
    pruned(source, tmp_path / "out", program="llama.cpp", allocation="uniform", recovery="lstsq", bias="no")
    spec = FAMILIES[family]
    assert spec.gguf is not None
    with mock.patch.object(export_gguf, "gguf_names", lambda *_: spec.gguf):  # qwen2 is otherwise written as llama
        export(tmp_path / "out", tmp_path / "m.gguf", "gguf")
    model, _ = slimllm.load(tmp_path / "m.gguf")
    folder, _ = slimllm.load(tmp_path / "out")
    assert type(model) is type(folder) and model.config.model_type == family
    found, wanted = dict(model.named_parameters()), dict(folder.named_parameters())
    assert set(found) == set(wanted)
    with torch.no_grad():
        for name, tensor in wanted.items():  # a norm of Gemma's is stored with 1 added, which rounds it
            assert torch.allclose(found[name], tensor, rtol=0, atol=1e-6), name
        assert torch.allclose(model(IDS).logits, folder(IDS).logits, atol=1e-4)
    pruned(tmp_path / "m.gguf", tmp_path / "again", program="llama.cpp", ratio=0.2)
    assert export(tmp_path / "again", tmp_path / "again.gguf", "gguf") == (
        "deci" if family == "qwen2" else family.removesuffix("_text")
    )
