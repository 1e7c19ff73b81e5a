"""Latency: what is counted and said; speed itself is for `slimllm latency` to measure."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
from commands import call
from conftest import STORIES, config

from slimllm import prune
from slimllm.errors import InputError
from slimllm.evaluation.latency import Latency, Shape, Timed, measure_latency


@pytest.fixture(scope="module")
def pruned(token_ids: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("latency") / "half"
    prune(STORIES, out, config(token_ids, ratio=0.5))
    return out


@pytest.mark.slow
def test_models_in_turn(pruned: Path) -> None:
    told: list[tuple[int, int, str]] = []
    found = measure_latency(
        [STORIES, pruned],
        batch_sizes=[1, 3],
        prompts=[16],
        new_tokens=4,
        rounds=2,
        progress=lambda done, total, about: told.append((done, total, about)),
    )
    assert [(line.model, line.shape.batch_size) for line in found.lines] == [
        (str(model), batch) for batch in (1, 3) for model in (STORIES, pruned)
    ]
    dense, half = found.lines[:2]
    for line in found.lines:
        assert len(line.first_token_s) == len(line.next_tokens_s) == 2
        assert min(line.first_token_s + line.next_tokens_s) > 0
    # Every weight of the layers for each token, the attention's products, and of the head for one of 16.
    layers, head, width = 5 * (4 * 64 * 64 - 2 * 32 * 64 + 3 * 64 * 172), 512 * 64, 64
    rotary = 4 * 16  # cos and sin are a product, once for the whole model; of the same order as nothing
    assert dense.prefill_macs == pytest.approx(layers + head / 16 + 5 * 2 * 16 * width, abs=rotary)
    assert dense.decode_macs == pytest.approx(layers + head + 5 * 2 * 17 * width, abs=rotary)
    assert half.parameters < dense.parameters and half.decode_macs < dense.decode_macs
    assert all(0 < size < 2 for size in found.memory_gib)
    assert told[0][:2] == (0, 12) and told[-1] == (12, 12, "") and "half, 3 × 16" in told[-2][2]


def test_ratios_of_turns() -> None:
    """Each round against its own, so that a slow spell of the machine counts on neither side."""
    shape = Shape(2, 10, 5)
    dense = Timed("a", shape, [1.0, 10.0, 1.0], [2.0, 20.0, 2.0], 7, 1.0, 1.0)
    half = Timed("b", shape, [0.5, 5.0, 0.25], [1.0, 10.0, 2.0], 5, 0.5, 0.5)
    found = Latency([dense, half], [1.0, 1.0], "float32", "cpu", 1)
    assert dense.prefill_rates == [20.0, 2.0, 20.0] and half.decode_rates == [8.0, 0.8, 4.0]
    assert found.speedup(half, "prefill_rates") == 2.0 and found.speedup(half, "decode_rates") == 2.0
    assert found.speedup(dense, "decode_rates") == 1.0


@pytest.mark.slow
def test_command(pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "latency.json"
    options = ["--prompt", "8", "--new-tokens", "3", "--rounds", "1", "--out", str(out)]
    code, words, _ = call(capsys, "latency", STORIES, pruned, *options)
    assert code == 0 and "half" in words and "float32 on cpu" in words
    assert "of a single round" in words and "±" not in words
    content = json.loads(out.read_text())
    assert [line["model"] for line in content["lines"]] == [str(STORIES), str(pruned)]
    for line in content["lines"]:
        assert (
            line["prefill_per_s"] == 8 / line["first_token_s"][0] and line["decode_per_s"] == 2 / line["next_tokens_s"][0]
        )
    dense, half = content["lines"]
    assert dense["decode_speedup"] == 1 and half["prefill_speedup"] == half["prefill_per_s"] / dense["prefill_per_s"]
    before = out.read_bytes()
    code, _, words = call(capsys, "latency", STORIES, *options)
    assert code == 2 and "latency.json" in words and out.read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"new_tokens": 1}, "new_tokens must be at least 2, got 1"),
        ({"batch_sizes": [1, 0]}, "batch_sizes must be at least 1, got 1, 0"),
        ({"prompts": []}, "prompts must be at least 1, got none"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"prompts": [510]}, "510 tokens and 32 new ones are more than .* takes, which is 512"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        measure_latency([STORIES], **settings)  # type: ignore[arg-type]


def test_a_killed_process_is_said_and_none_is_left() -> None:
    others = multiprocessing.active_children()

    def progress(done: int, total: int, about: str) -> None:
        if done == 1:
            (one,) = [child for child in multiprocessing.active_children() if child not in others]
            one.kill()

    with pytest.raises(InputError, match=r"was killed, probably because memory ran out"):
        measure_latency([STORIES], prompts=[8], new_tokens=2, rounds=2, progress=progress)
    assert [child for child in multiprocessing.active_children() if child not in others] == []


def test_a_model_that_stops_by_itself_is_told_to_go_on(tmp_path: Path) -> None:
    """Its end of text is every token, and all that were asked for are generated all the same."""
    shutil.copytree(STORIES, tmp_path / "model")
    settings = {"eos_token_id": list(range(512)), "bos_token_id": 1}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    found = measure_latency([tmp_path / "model"], prompts=[8], new_tokens=6, rounds=1, dtype="bfloat16")
    assert found.dtype == "bfloat16" and found.lines[0].next_tokens_s[0] > 0


@pytest.mark.slow
def test_models_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Give at least one model"):
        measure_latency([])
    with pytest.raises(InputError, match=r"holds no config\.json"):
        measure_latency([STORIES, tmp_path])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="holds no weights"):
        measure_latency([STORIES, tmp_path])
