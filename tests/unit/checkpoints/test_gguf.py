"""GGUF files as input: whatever they are called, in parts, with scaled rotary embeddings, damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from commands import call
from conftest import STORIES, config, logits, random_llama
from gguf_files import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

import slimllm
from slimllm import InputError, PruneConfig
from slimllm.checkpoints.opening import open_checkpoint
from slimllm.export.api import export
from slimllm.models.families import head_dim_of
from slimllm.models.meta import meta_model
from slimllm.models.modeling.slim_layers import knows_rope_parameters


@pytest.fixture
def gguf_path(stories: Any, tmp_path: Path) -> Path:
    return write_gguf(stories, tmp_path / "stories.gguf")


def test_gguf_holds_the_same_tensors(gguf_path: Path, stories: Any) -> None:
    checkpoint = open_checkpoint(gguf_path)
    state = stories.state_dict()
    for name, tensor in checkpoint.read(checkpoint.shapes()).items():
        assert torch.equal(tensor, state[name]), name
    assert set(checkpoint.shapes()) == set(state) - {"lm_head.weight"}


def test_gguf_loads_prunes_and_gives_the_same_as_the_folder(
    gguf_path: Path, stories_path: Path, stories: Any, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    loaded, _ = slimllm.load(gguf_path, device="cpu")
    with torch.no_grad():
        assert torch.allclose(loaded(token_ids[:2]).logits, stories(token_ids[:2]).logits, atol=1e-5)
    config = PruneConfig(0.3, "slimllm", calibration=token_ids)
    slimllm.prune(gguf_path, tmp_path / "a", config)
    slimllm.prune(stories_path, tmp_path / "b", config)
    for shard in (tmp_path / "b").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "a" / shard.name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "a")


def test_quantised_gguf_is_written_as_bfloat16(stories: Any, token_ids: torch.Tensor, tmp_path: Path) -> None:
    path = write_gguf(stories, tmp_path / "q8.gguf", gguf.GGMLQuantizationType.Q8_0)
    slimllm.prune(path, tmp_path / "out", PruneConfig(0.3, "slimllm", calibration=token_ids))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype="auto")
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.isfinite(model(token_ids[:1]).logits).all()


@pytest.mark.parametrize(("file", "name"), [("UP.GGUF", "UP"), ("sha256-abcdef", "sha256-abcdef"), ("v1.5", "v1.5")])
def test_gguf_is_known_by_its_content(gguf_path: Path, stories: Any, file: str, name: str) -> None:
    """As ollama stores it, without a suffix, too."""
    checkpoint = open_checkpoint(gguf_path.rename(gguf_path.with_name(file)))
    assert checkpoint.name == name and set(checkpoint.shapes()) == set(stories.state_dict()) - {"lm_head.weight"}
    assert checkpoint.tokenizer().vocab_size == 512
    assert torch.equal(checkpoint.read(["model.norm.weight"])["model.norm.weight"], stories.model.norm.weight)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        ((STORIES / "model.safetensors").read_bytes(), "is a safetensors file; give the folder that contains it"),
        (b"PK\x03\x04archive/data.pkl", "is a pickled PyTorch file, which is never read"),
        (b"\x80\x02}q\x00", "is a pickled PyTorch file, which is never read"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"tjgg\x03\x00\x00\x00", "is a GGML file"),
        (b"no GGUF at all, but longer than a header would be", "is neither a folder nor a GGUF file"),
    ],
)
@pytest.mark.parametrize("name", ["model.gguf", "model"])
def test_a_file_that_is_something_else(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        open_checkpoint(tmp_path / name)


def test_damaged_files_on_the_command_line(gguf_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sentence for each, wherever the file ends."""
    content = gguf_path.read_bytes()
    cut, folder = tmp_path / "cut.gguf", tmp_path / "x.gguf"
    folder.mkdir()
    for length in (0, 4, 20, 100, 1_000, 8_000, 12_000, len(content) // 2, len(content) - 1_000):
        cut.write_bytes(content[:length])
        with pytest.raises(InputError, match="is empty" if length == 0 else "damaged or truncated"):
            open_checkpoint(cut)
    for command in (("prune", "--ratio", "0.2"), ("export", "--to", "stock")):
        for model, sentence in ((cut, "damaged or truncated"), (folder, "holds no config.json")):
            code, _, err = call(capsys, command[0], model, *command[1:], "--out", tmp_path / "out")
            assert code == 2 and err.startswith("Error: ") and sentence in err and "\n" not in err
    code, _, err = call(capsys, "export", STORIES, "--to", "gguf", "--out", folder)
    assert code == 2 and "is a folder; give the name of a file" in err


def test_big_endian_is_not_read_wrongly(gguf_path: Path) -> None:
    content = bytearray(gguf_path.read_bytes())
    content[4:24] = b"".join(bytes(reversed(content[at : at + size])) for at, size in ((4, 4), (8, 8), (16, 8)))
    content[16:24] = (0).to_bytes(8, "big")  # no settings
    content[8:16] = (0).to_bytes(8, "big")  # and no tensors, to be spared from writing them
    gguf_path.write_bytes(content)
    with pytest.raises(InputError, match="is big-endian"):
        open_checkpoint(gguf_path)


def test_a_type_that_cannot_be_dequantised(stories: Any, tmp_path: Path) -> None:
    path = write_gguf(stories, tmp_path / "m.gguf", more={"blk.0.ffn_gate.scale": np.ones(4, dtype=np.float64)})
    with pytest.raises(InputError, match="tensors of type F64, which cannot be dequantised"):
        open_checkpoint(path)


@pytest.fixture
def parts(stories: Any, tmp_path: Path) -> list[Path]:
    """A model in three parts, as llama-gguf-split makes them."""
    (tmp_path / "parts").mkdir()
    write_gguf(stories, tmp_path / "parts" / "m.gguf", tensors_in_a_part=18)
    return sorted((tmp_path / "parts").iterdir())


def test_parts_are_one_model(parts: list[Path], gguf_path: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    assert [part.name for part in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    whole = open_checkpoint(gguf_path)
    wanted = whole.read(whole.shapes())
    for part in parts:
        checkpoint = open_checkpoint(part)
        tensors = checkpoint.read(checkpoint.shapes())
        assert checkpoint.name == "m" and checkpoint.path == parts[0] and tensors.keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors.items())
        own, theirs = checkpoint.config.to_dict(), whole.config.to_dict()
        assert own.pop("_name_or_path") != theirs.pop("_name_or_path") and own == theirs
    settings = PruneConfig(0.3, "slimllm", calibration=token_ids)
    slimllm.prune(parts[1], tmp_path / "a", settings)
    slimllm.prune(gguf_path, tmp_path / "b", settings)
    for shard in (tmp_path / "b").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "a" / shard.name).read_bytes()


def test_parts_that_are_not_of_one_model(parts: list[Path], stories: Any, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copyfile(parts[0], other / "m.gguf")
    with pytest.raises(InputError, match=r"is part 1 of 3 .* name it NAME-00001-of-00003.gguf"):
        open_checkpoint(other / "m.gguf")
    content = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(InputError, match=r"is part 3 of 3 .*, but m-00002-of-00003.gguf is not in its folder"):
        open_checkpoint(parts[2])
    shutil.copyfile(parts[2], parts[1])
    with pytest.raises(InputError, match=r"m-00002-of-00003\.gguf is not part 2 of 3"):
        open_checkpoint(parts[0])
    parts[1].write_bytes(content)
    write_gguf(stories, other / "m.gguf", tensors_in_a_part=22)
    shutil.copyfile(other / "m-00002-of-00003.gguf", parts[1])
    with pytest.raises(InputError, match="hold 51 tensors, but the model that was split had 47"):
        open_checkpoint(parts[0])


@pytest.mark.parametrize(
    ("settings", "more"),
    [({"llama.expert_count": 8}, {}), ({}, {"blk.0.ffn_gate_exps.weight": np.ones((2, 8, 32), dtype=np.float32)})],
)
def test_mixtures_of_experts_are_refused(
    stories: Any, tmp_path: Path, settings: dict[str, Any], more: dict[str, Any]
) -> None:
    path = write_gguf(stories, tmp_path / "m.gguf", settings=settings, more=more)
    with pytest.raises(InputError, match="is a mixture of experts, which is not read from GGUF"):
        open_checkpoint(path)


def test_other_architectures_are_refused(stories: Any, tmp_path: Path) -> None:
    path = write_gguf(stories, tmp_path / "m.gguf", architecture="gpt2", settings={"llama.expert_count": 8})
    with pytest.raises(InputError, match="of architecture 'gpt2' are not supported; supported are gemma2, gemma3, llama"):
        open_checkpoint(path)


@pytest.mark.skipif(not knows_rope_parameters(), reason="transformers 4 reads no tokenizer from a file with this name")
@pytest.mark.skipif(transformers.__version__ == "5.0.0", reason="transformers 5.0.0 wants another library for it")
def test_a_model_called_mistral_has_no_windows(stories: Any, token_ids: torch.Tensor, tmp_path: Path) -> None:
    """transformers takes it for a Mistral with windows of 4096, which llama.cpp does not know of."""
    path = write_gguf(stories, tmp_path / "m.gguf", settings={"general.name": "mistral"})
    assert getattr(open_checkpoint(path).config, "sliding_window", None) is None
    assert torch.allclose(logits(slimllm.load(path, device="cpu")[0], token_ids), logits(stories, token_ids), atol=1e-5)


def inverse_frequencies(path: Path) -> torch.Tensor:
    return meta_model(open_checkpoint(path).config).model.rotary_emb.inv_freq


PLAIN = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
ONES = np.ones(4, dtype=np.float32)


@pytest.mark.parametrize(
    ("settings", "factors", "divisor"),
    [
        ({}, None, 1),
        ({"scale_linear": 2.0}, None, 2),
        ({"scale_linear": 1.0}, None, 1),
        ({"scaling.factor": 2.0}, None, 2),  # llama.cpp takes a factor without a type for a linear one
        ({"scaling.type": "linear", "scaling.factor": 2.5, "scale_linear": 9.0}, None, 2.5),
        ({"scaling.type": "linear", "scaling.factor": 0.0}, None, 1),
        ({"scaling.type": "none", "scaling.factor": 2.0}, None, 1),
        ({}, ONES, 1),
        ({}, 8 * ONES, 8),
        ({"scaling.factor": 2.0}, 1.5 * ONES, 3),
    ],
)
def test_linear_scaling(stories: Any, tmp_path: Path, settings: dict[str, Any], factors: Any, divisor: float) -> None:
    path = write_gguf(
        stories,
        tmp_path / "m.gguf",
        settings={f"llama.rope.{name}": value for name, value in settings.items()},
        more={} if factors is None else {"rope_freqs.weight": factors},
    )
    assert torch.allclose(inverse_frequencies(path), PLAIN / divisor, rtol=1e-6, atol=0)
    config = open_checkpoint(path).config
    rope = config.rope_parameters if knows_rope_parameters() else config.rope_scaling or {"rope_type": "default"}
    assert rope["rope_type"] == ("default" if divisor == 1 else "linear") and rope.get("factor", 1) == divisor


def test_linear_scaling_gives_the_same_as_the_folder(token_ids: torch.Tensor, tmp_path: Path) -> None:
    shutil.copytree(STORIES, tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    settings = json.loads(path.read_text())
    settings |= {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    path.write_text(json.dumps(settings))
    export(tmp_path / "dense", tmp_path / "m.gguf", "gguf")
    models = [slimllm.load(tmp_path / name, device="cpu")[0] for name in ("dense", "m.gguf")]
    assert torch.allclose(logits(models[0], token_ids), logits(models[1], token_ids), atol=1e-4)
    slimllm.prune(tmp_path / "m.gguf", tmp_path / "out", config(token_ids))
    assert torch.allclose(inverse_frequencies(tmp_path / "out"), PLAIN / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("settings", "more", "sentence"),
    [
        ({"scaling.type": "yarn", "scaling.factor": 4.0}, {}, "rule 'yarn'"),
        ({"scaling.type": "longrope"}, {}, "rule 'longrope'"),
        ({}, {"rope_factors_long.weight": 2 * ONES}, "rule 'longrope'"),
        ({"scaling.attn_factor": 1.2}, {}, "attn_factor"),
        ({}, {"rope_freqs.weight": np.ones(3, dtype=np.float32)}, "does not have one factor for each frequency"),
        ({}, {"rope_freqs.weight": np.array([1, 5, 2, 8], dtype=np.float32)}, "do not follow LLaMA 3's rule"),
        ({}, {"rope_freqs.weight": 0 * ONES}, "by factors that are not finite numbers above 0"),
    ],
)
def test_other_scaling_is_refused_by_name(
    stories: Any, tmp_path: Path, settings: dict[str, Any], more: dict[str, Any], sentence: str
) -> None:
    renamed = {f"llama.rope.{name}": value for name, value in settings.items()}
    with pytest.raises(InputError, match=sentence):
        open_checkpoint(write_gguf(stories, tmp_path / "m.gguf", settings=renamed, more=more))


@pytest.mark.parametrize(
    ("theta", "head_dim", "scaling", "recovered"),
    [
        (500000.0, 64, (8.0, 1.0, 4.0, 8192), True),  # LLaMA 3.1
        (500000.0, 64, (32.0, 1.0, 4.0, 8192), True),  # LLaMA 3.2
        (500000.0, 64, (8.0, 1.0, 3.0, 2048), True),
        (10000.0, 32, (16.0, 1.0, 4.0, 333), True),
        (10000.0, 32, (4.0, 1.5, 6.0, 250), False),  # the same numbers as those of 166 2/3, 1 and 4
        (10000.0, 8, (8.0, 1.0, 4.0, 32), False),  # one frequency between those that are scaled and those that are not
        (10000.0, 8, (8.0, 1.0, 2.0, 30), False),  # none
    ],
)
def test_scaling_of_llama_3(
    tmp_path: Path, theta: float, head_dim: int, scaling: tuple[float, float, float, int], recovered: bool
) -> None:
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    rule = dict(zip(names, scaling))
    model = random_llama(
        vocab_size=512,
        head_dim=head_dim,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=2,
        max_position_embeddings=2 * int(scaling[3]),
        attention_bias=False,
        mlp_bias=False,
        rope_parameters={"rope_type": "llama3", "rope_theta": theta, **rule},
    )
    model.save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(tmp_path / "dense")
    assert export(tmp_path / "dense", tmp_path / "m.gguf", "gguf") == "llama"
    read = open_checkpoint(tmp_path / "m.gguf").config
    settings = read.rope_parameters if knows_rope_parameters() else read.rope_scaling
    assert settings["rope_type"] == "llama3" and head_dim_of(read) == head_dim
    assert type(settings["original_max_position_embeddings"]) is int
    assert not recovered or {name: settings[name] for name in names} == rule
    own, again = (inverse_frequencies(tmp_path / name) for name in ("dense", "m.gguf"))
    assert torch.equal(own, again) if recovered else torch.allclose(own, again, rtol=2e-6, atol=0)
    assert not torch.allclose(again, theta ** -(torch.arange(0, head_dim, 2) / head_dim), rtol=0.1)
    ids = torch.randint(3, 512, (2, 64), generator=torch.Generator().manual_seed(0))
    models = [slimllm.load(tmp_path / name, device="cpu")[0] for name in ("dense", "m.gguf")]
    assert torch.allclose(logits(models[0], ids), logits(models[1], ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"llama.expert_count": "many"}, "'many' as llama.expert_count, which is not a number"),
        ({"split.count": "two"}, "'two' as split.count, which is not a number"),
        ({"llama.rope.scaling.factor": "two"}, "which is not a number"),
        ({"llama.rope.freq_base": 0.0}, "base of its rotary embedding, which must be above 0"),
        ({"llama.rope.freq_base": float("nan")}, "which is not a number"),
    ],
)
def test_settings_that_are_not_what_they_should_be(
    settings: dict[str, Any], sentence: str, stories: Any, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=sentence):
        open_checkpoint(write_gguf(stories, tmp_path / "m.gguf", settings=settings))
