"""Files that are meant to do harm, or are merely odd: none costs memory, time or a traceback, and none is believed."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call
from conftest import STORIES
from gguf_files import write_gguf
from rich.console import Console
from safetensors.torch import load_file, save_file

import slimllm
from slimllm import InputError, PruneConfig
from slimllm.checkpoints.folder import read_settings
from slimllm.checkpoints.foreign_json import EVERY, POSITIVE, check_shape, read_json
from slimllm.checkpoints.opening import open_checkpoint
from slimllm.checkpoints.tokenizer import encode, load_tokenizer
from slimllm.cli.display import print_summary
from slimllm.errors import HopelessError
from slimllm.pruning.model_card import in_block, in_line
from slimllm.pruning.report import PruneReport

QUICK = ("--samples", "4", "--seq-len", "32")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(STORIES, tmp_path / "model"))


@pytest.fixture
def bounded() -> Iterator[None]:
    """A quarter of a GiB more than there is, and half a minute, so that what grows or hangs fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + 2**28, before[1]))
    alarm = signal.signal(signal.SIGALRM, lambda number, frame: pytest.fail("it takes more than 30 s"))
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, alarm)
    resource.setrlimit(resource.RLIMIT_AS, before)


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *commands: str) -> list[str]:
    """The sentences with which the commands refuse a model."""
    found = []
    for command in commands:
        arguments: list[str | Path] = [command, folder]
        if command == "prune":
            arguments += ["--out", folder.parent / "out", "--ratio", "0.2", *QUICK]
        if command == "export":
            arguments += ["--out", folder.parent / "out", "--to", "stock"]
        code, _, err = call(capsys, *arguments)
        err = re.sub(r"evaluating: \d+ of \d+\s", "", err)
        assert code == 2 and err.startswith("Error: ") and "Traceback" not in err, (command, err)
        found.append(err)
    assert not (folder.parent / "out").exists()
    return found


# --- counts that files state


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 1500),
        ("num_hidden_layers", 3),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", -5),
        ("num_hidden_layers", "5"),
        ("num_hidden_layers", 5.0),
        ("vocab_size", 10**12),
        ("num_key_value_heads", 10**9),
        ("hidden_size", True),
        ("intermediate_size", 10**9),
        ("head_dim", 10**8),
    ],
)
def test_sizes_in_config_json(
    folder: Path, capsys: pytest.CaptureFixture[str], bounded: None, name: str, value: Any
) -> None:
    change(folder / "config.json", **{name: value})
    for err in refused(capsys, folder, "prune", "eval", "export"):
        assert (
            name in err
            or "gives 1,500 layers" in err
            or "no place in the model" in err
            or "its config.json asks for" in err
        )
    if value not in (3, 1500):  # without the weights nobody knows better
        assert name in refused(capsys, folder, "plan")[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.block_count", 10**9),
        ("llama.block_count", 400),
        ("llama.rope.dimension_count", 10**9),
        ("llama.embedding_length", 10**9),
        ("llama.attention.head_count", 0),
        ("llama.feed_forward_length", 2**31),
    ],
)
def test_sizes_in_gguf(stories: Any, tmp_path: Path, bounded: None, key: str, value: int) -> None:
    path = write_gguf(stories, tmp_path / "m.gguf")
    content = bytearray(path.read_bytes())
    at = content.index(key.encode()) + len(key)
    content[at + 4 : at + 8] = struct.pack("<I", value)
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"as {key}, which does not fit its tensors"):
        open_checkpoint(path)


@pytest.mark.parametrize("count", [600, 2**20, 2**40, 2**64 - 1])
@pytest.mark.parametrize("key", ["tokenizer.ggml.tokens", "tokenizer.ggml.scores"])
def test_lengths_in_gguf(stories: Any, tmp_path: Path, bounded: None, key: str, count: int) -> None:
    path = write_gguf(stories, tmp_path / "m.gguf")
    content = bytearray(path.read_bytes())
    at = content.index(key.encode()) + len(key) + 8  # after the types of the setting and of its items
    content[at : at + 8] = struct.pack("<Q", count)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be read as GGUF .* it is damaged or truncated"):
        open_checkpoint(path)


@pytest.mark.parametrize("at", [8, 16])  # how many tensors, how many settings
def test_counts_in_gguf(stories: Any, tmp_path: Path, bounded: None, at: int) -> None:
    path = write_gguf(stories, tmp_path / "m.gguf")
    content = bytearray(path.read_bytes())
    content[at : at + 8] = struct.pack("<Q", 2**33)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"tensors and .* settings do not fit into it"):
        open_checkpoint(path)


def test_a_rank_that_no_matrix_has(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time. " * 500)
    code, _, err = call(
        capsys, "finetune", folder, "--data", text, "--out", tmp_path / "out", "--rank", "100000", "--seq-len", "32"
    )
    assert code == 2 and "rank is 100000, but the model's matrices have only 64 rows or columns" in err


# --- weights


@pytest.mark.parametrize("kind", ["NaN", "integers"])
def test_weights_that_are_no_numbers(folder: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int32) if kind == "integers" else tensors[name] * torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for err in refused(capsys, folder, "eval", "prune"):
        assert {"integers": "is stored as I32", "NaN": "N"}[kind] in err and ("NaN" in err) == (kind == "NaN")
        assert "compute in float32" not in err


def test_float32_is_not_told_to_compute_in_float32(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"] *= 1e38
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HopelessError, match=r"computed in float32; its weights are out of all proportion"):
        slimllm.prune(folder, tmp_path / "out", PruneConfig(0.2, "slimllm", samples=2, seq_len=16))


def test_a_tokenizer_of_a_larger_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][-1], "id": 512, "content": "the"})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    for err in refused(capsys, folder, "eval", "prune"):
        assert "512" in err and "is this the tokenizer of this model?" in err


# --- JSON


@pytest.mark.parametrize("deep", ["[" * 100_000 + "]" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "tokenizer_config.json", "report.json"])
def test_deeply_nested(folder: Path, capsys: pytest.CaptureFixture[str], file: str, deep: str) -> None:
    commands = ["prune", "eval"]
    if file == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink()
    if file == "report.json":
        commands = ["report"]
    (folder / file).write_text(deep)
    for err in refused(capsys, folder, *commands):
        assert "nested too deeply" in err and file in err


@pytest.mark.parametrize(
    "values",
    [
        {"model_max_length": "x"},
        {"model_max_length": [1]},
        {"bos_token": 5},
        {"added_tokens_decoder": []},
        {"chat_template": 3},
        {"tokenizer_class": {}},
    ],
)
def test_tokenizer_settings_of_another_kind(
    folder: Path, capsys: pytest.CaptureFixture[str], values: dict[str, Any]
) -> None:
    change(folder / "tokenizer_config.json", **values)
    for err in refused(capsys, folder, "prune", "eval"):
        assert "tokenizer_config.json" in err and next(iter(values)) in err and "should be" in err


def test_a_tokenizer_with_code_and_odd_tokens(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without its code it is read from tokenizer.json, which may fail as well."""
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "x.Y"]}, unk_token={"x": 1})
    for err in refused(capsys, folder, "prune", "eval"):
        assert "The tokenizer in" in err and "cannot be loaded" in err


@pytest.mark.parametrize("kind", ["PanicException", "ValueError"])
def test_a_tokenizer_that_fails_on_a_text(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """One that is written in Rust panics, which is no Exception."""
    tokenizer = load_tokenizer(folder)
    error = type(kind, (BaseException if kind == "PanicException" else ValueError,), {})

    def fails(*words: object, **settings: object) -> None:
        raise error("no entry found for key")

    monkeypatch.setattr(type(tokenizer), "_encode_plus", fails)
    with pytest.raises(InputError, match=r"fails on the text \(no entry found for key"):
        encode(tokenizer, "Once upon a time")


REAL = {
    "SmolLM2": {"model_type": "llama", "is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1},
    "Gemma 3n": {"model_type": "gemma3n", "text_config": {"intermediate_size": [8192] * 30, "num_kv_shared_layers": 10}},
    "LLaMA 3": {"model_type": "llama", "rope_scaling": {"factor": 8.0, "rope_type": "llama3"}, "eos_token_id": [1, 2]},
    "Phi-3": {"model_type": "phi3", "embd_pdrop": 0.0, "num_key_value_heads": 32, "sliding_window": 2047},
    "OPT": {"model_type": "opt", "word_embed_proj_dim": 768, "ffn_dim": 3072, "prefix": "</s>", "torch_dtype": "float16"},
    "BLOOM": {"model_type": "bloom", "n_layer": 24, "num_attention_heads": 16, "n_embed": 1024, "offset_alibi": 100},
    "DeciLM": {"model_type": "nemotron-nas", "num_key_value_heads": None, "head_dim": None, "num_parameters": 10**11},
    "half": {"model_type": "llama", "torch_dtype": "half", "n_inner": None},
}


@pytest.mark.parametrize("name", REAL)
def test_what_real_models_have_is_not_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(REAL[name]))
    assert read_settings(tmp_path) == REAL[name]


@pytest.mark.parametrize(
    "values", [{"dtype": 3}, {"torch_dtype": ["x"]}, {"rope_parameters": 7}, {"text_config": "x"}, {"architectures": [3]}]
)
def test_settings_of_another_kind(folder: Path, capsys: pytest.CaptureFixture[str], values: dict[str, Any]) -> None:
    change(folder / "config.json", **values)
    refused(capsys, folder, "prune", "plan")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "out"
    slimllm.prune(STORIES, out, PruneConfig(0.3, "slimllm", samples=2, seq_len=32))
    return out


def test_a_report_without_what_earlier_versions_lack(pruned: Path, tmp_path: Path) -> None:
    report = json.loads((pruned / "report.json").read_text())
    for path in (("schema_version",), ("calibration", "bos"), ("calibration", "held_out"), ("config", "round_to")):
        _delete(*path)(report)
    for name in (
        "host_memory",
        "gpu_memory",
        "device",
        "head_unit",
        "heads_multiple_of",
        "method_settings",
        "method_needs",
    ):
        _delete("config", name)(report)
    (tmp_path / "report.json").write_text(json.dumps(report))
    read = PruneReport.read(tmp_path)
    out = io.StringIO()
    print_summary(Console(file=out, width=200), read)
    assert (
        "BOS not recorded" in out.getvalue() and read.schema_version == 1 and read.methods.startswith("criterion slimllm,")
    )


def _delete(*path: Any) -> Callable[[dict[str, Any]], None]:
    return lambda report: _holder(report, path).__delitem__(path[-1])


def _set(value: Any, *path: Any) -> Callable[[dict[str, Any]], None]:
    return lambda report: _holder(report, path).__setitem__(path[-1], value)


def _holder(report: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        report = report[key]
    return report


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_delete("calibration"), "calibration is missing"),
        (_delete("calibration", "perplexity_pruned"), "calibration.perplexity_pruned is missing"),
        (_set("x", "calibration", "perplexity_dense"), "calibration.perplexity_dense is 'x'"),
        (_set(float("nan"), "calibration", "perplexity_dense"), "calibration.perplexity_dense is 'nan'"),
        (_set(0, "parameters", "before"), "parameters.before is '0', but should be a finite number above 0"),
        (_set([], "layers"), "it has no layers"),
        (_set({}, "layers"), "layers is '{}'"),
        (_set(10**9, "layers", 1, "num_heads_before"), "its layers have 10000000"),
        (_set([10**6], "layers", 0, "kept_channels"), "layer 0 has kept a channel that it does not have"),
        (_set([1.0], "layers", 1, "channel_importance"), "layer 1 does not have as many importances as channels"),
        (_set(7, "layers", 2, "index"), "layer 2 has the index 7"),
        (_set(99, "schema_version"), "or is of a later version of slimllm; update this one"),
        (_set("2", "schema_version"), "schema_version is '2'"),
        (_set(10**30, "layers", 1, "num_kv_heads"), "layers[1].num_kv_heads is '1000000"),
        (_set("x", "config", "round_to"), "config.round_to is 'x'"),
        (_set(0, "dense_pass_s"), "dense_pass_s is '0'"),
        (_set("fast", "stages_s", "read"), "stages_s.read is 'fast'"),
        (_set(1.0, "stages_s", "$x^"), "is not a name of a part"),
        (_set(None, "config"), "config is missing"),
        (_set(["x"], "allocation", "notes", 0), "allocation.notes[0]"),
        (_set(1, "a new field"), "another version of slimllm"),
        (_delete("layers", 0, "kept_heads"), "layers[0].kept_heads"),
    ],
)
def test_an_edited_report(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], edit: Callable[[dict[str, Any]], None], words: str
) -> None:
    report = json.loads((pruned / "report.json").read_text())
    report["allocation"]["notes"] = ["a note"]
    edit(report)
    (tmp_path / "report.json").write_text(json.dumps(report))
    code, _, err = call(capsys, "report", tmp_path, "--no-sample")
    assert code == 2 and words in err and "is not the report of a pruning run" in err, err


def test_json_in_one_place(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    for content, words in ((b"{", "is not valid JSON"), (b"\xff", "is not valid JSON"), (None, "is not a file")):
        if content is None:
            file.unlink()
            file.mkdir()
        else:
            file.write_bytes(content)
        with pytest.raises(InputError, match=words):
            read_json(file)
    shape = {"a": int, "b?": [float], "c": {EVERY: POSITIVE}, "d": (str, dict), "e": bool}
    good = {"a": 0, "c": {"x": 1, "y": 0.5}, "d": "", "e": True}
    check_shape(good, shape, "")
    check_shape({**good, "b": [-1, 2.5], "d": {}, "more": None}, shape, "")
    for change_, words in (
        ({"a": -1}, "a is '-1', but should be a whole number"),
        ({"a": True}, "a is 'True'"),
        ({"a": 1.0}, "a is '1.0'"),
        ({"b": [1, "x"]}, r"b\[1\] is 'x'"),
        ({"c": {"x": 0}}, "c.x is '0'"),
        ({"d": 3}, "d is '3', but should be a string or an object"),
        ({"e": 1}, "e is '1'"),
        ({"c": None}, "c is missing"),
        ({"a": 10**400}, "a is '10000"),
    ):
        with pytest.raises(InputError, match=words):
            check_shape({**good, **change_}, shape, "")


# --- what lies beside the weights


def test_odd_files_beside_a_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are looked at before anything is computed; a run is not ended by them, and copies none of them."""
    (folder / "LICENSE").symlink_to("nowhere")
    (folder / "NOTICE").symlink_to("NOTICE")
    os.mkfifo(folder / "USE_POLICY.md")
    (folder / "merges.txt").symlink_to("/dev/zero")
    private = tmp_path / "private.model"
    private.write_text("of the user's")
    (folder / "spiece.model").symlink_to(private)
    code, _, err = call(capsys, "prune", folder, "--out", tmp_path / "out", "--ratio", "0.2", *QUICK)
    assert code == 2 and "merges.txt is a device or a pipe, not a file, so it cannot be copied to the result" in err
    (folder / "merges.txt").unlink()
    code, _, err = call(capsys, "prune", folder, "--out", tmp_path / "out", "--ratio", "0.2", *QUICK)
    assert code == 2 and "spiece.model is a link that leads out of its folder, so it cannot be copied to the result" in err
    (folder / "spiece.model").unlink()
    code, out, err = call(capsys, "prune", folder, "--out", tmp_path / "out", "--ratio", "0.2", *QUICK)
    assert code == 0, err
    before_the_work = out[: out.index("Calibrating on the bundled text")]
    for name, fault in (
        ("LICENSE", "is a link to nothing"),
        ("NOTICE", "is a link to nothing"),
        ("USE_POLICY.md", "is a device or a pipe, not a file"),
    ):
        assert f"{name} {fault}, so it is not copied." in before_the_work
        assert not os.path.lexists(tmp_path / "out" / name)


def test_names_in_a_model_card(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)> `x` [v](http://x) *b* |\n# Title"
    line = in_line(name)
    assert "\n" not in line and not any(f"{one}" in line.replace(f"\\{one}", "") for one in "<>`[]*|#")
    block = in_block("slimllm prune '```\n# Title'")
    assert block.startswith("````\n") and block.endswith("\n````")
    model = tmp_path / "a`b<i>\n## Bought"
    shutil.copytree(STORIES, model)
    slimllm.prune(model, tmp_path / "out", PruneConfig(0.2, "slimllm", samples=2, seq_len=16))
    card = (tmp_path / "out" / "README.md").read_text()
    outside = "".join(card.split("```")[::2])
    assert "# a\\`b\\<i\\> \\#\\# Bought, pruned by" in card and "\n## Bought" not in outside and "<i>" not in outside


def test_sentences_are_one_line_of_bounded_length() -> None:
    text = str(InputError("a\nb\x1b[31m" + "x" * 10_000 + "end."))
    assert text.startswith("a\\nb\\x1b[31m") and text.endswith("end.") and len(text) < 1100
