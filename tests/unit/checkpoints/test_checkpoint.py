from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import slimllm
from slimllm import InputError, PruneConfig
from slimllm.checkpoints.opening import open_checkpoint


def test_many_shards_give_the_same_as_one(
    stories: Any, stories_path: Path, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    stories.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    config = PruneConfig(0.3, "slimllm", calibration=token_ids)
    slimllm.prune(tmp_path / "sharded", tmp_path / "a", config)
    slimllm.prune(stories_path, tmp_path / "b", config)
    for shard in (tmp_path / "b").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "a" / shard.name).read_bytes()


def test_only_one_layer_is_in_memory(stories_path: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    """Tensors are read layer by layer, and what was read before is let go."""
    import weakref

    from slimllm.checkpoints.safetensors import SafetensorsCheckpoint

    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    original = SafetensorsCheckpoint._read

    def counted(self: SafetensorsCheckpoint, names: list[str]) -> dict[str, torch.Tensor]:
        nonlocal most
        tensors = original(self, names)
        alive.extend(weakref.ref(tensor) for tensor in tensors.values())
        most = max(most, sum(ref() is not None for ref in alive))
        return tensors

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsCheckpoint, "_read", counted)
        slimllm.prune(stories_path, tmp_path / "out", PruneConfig(0.3, "slimllm", calibration=token_ids))
    assert 0 < most <= 9  # a layer has nine tensors


def test_rope_of_a_config_written_by_transformers_5(stories_path: Path, tmp_path: Path) -> None:
    """transformers 4 would take the default base without a word."""
    import json
    import shutil

    from slimllm.models.meta import meta_model

    shutil.copytree(stories_path, tmp_path / "model")
    settings = json.loads((stories_path / "config.json").read_text())
    settings["rope_parameters"]["rope_theta"] = 123.0
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    rotary = meta_model(open_checkpoint(tmp_path / "model").config).model.rotary_emb
    assert torch.allclose(rotary.inv_freq, 123.0 ** (-torch.arange(0, 8, 2) / 8))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "awq weights"),
        ({"num_attention_heads": 7}, "cannot be used|asks for"),
        ({"hidden_size": "wide"}, "hidden_size in .* is 'wide', but should be a whole number"),
        ({"hidden_act": "nonsense"}, "cannot be used"),
        ({"num_hidden_layers": 0}, "num_hidden_layers in .* is '0'"),
        ({"architectures": "LlamaModel"}, "not a causal language model, but LlamaModel"),
    ],
)
def test_configurations_that_cannot_be_used(
    stories_path: Path, token_ids: torch.Tensor, tmp_path: Path, content: dict[str, Any], sentence: str
) -> None:
    import json
    import shutil

    shutil.copytree(stories_path, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
    with pytest.raises(InputError, match=sentence):
        slimllm.prune(tmp_path / "model", tmp_path / "out", PruneConfig(0.2, "slimllm", calibration=token_ids))
    path.write_text("[]")
    with pytest.raises(InputError, match="not a JSON object"):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("index", ["[]", '{"weight_map": []}', '{"weight_map": {"a": 5}}', "{}", "nonsense"])
def test_index_that_is_none(stories_path: Path, tmp_path: Path, index: str) -> None:
    import shutil

    shutil.copytree(stories_path, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()  # it would be read instead, as transformers does
    (tmp_path / "model" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=r"index\.json is not (an index of shards|a JSON object|valid JSON)"):
        open_checkpoint(tmp_path / "model")
