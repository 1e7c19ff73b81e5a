"""What travels with the weights: all of a tokenizer's files, whatever they are called, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import config

import slimllm
from slimllm import InputError
from slimllm.checkpoints import opening
from slimllm.checkpoints.companions import companions, copy_companions, files_to_fetch, left_out

KNOWN = [
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
    "added_tokens.json",
    "additional_chat_templates/tools.jinja",
    "bpe.codes",
    "chat_template.jinja",
    "chat_template.json",
    "cl100k.bpe",
    "en.vocab.json",
    "generation_config.json",
    "merges.txt",
    "merges-en.txt",
    "my.spiece.model",
    "qwen.tiktoken",
    "sentencepiece.bpe.model",
    "source.spm",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer_config.json",
    "vocab.bpe",
    "vocab.json",
    "vocab.txt",
    "vocab-en.json",
]
STRANGE = [
    "thesis.txt",
    "notes.json",
    "README.md",
    "config.json",
    "report.json",
    "report.html",
    "finetune.json",
    "model.safetensors",
    "tokenizer.safetensors",
    "vocab.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "modeling_mine.py",
    "configuration_mine.py",
    "slim_layers.py",
    "tokenization_mine.py",
    "tokenizer.py",
    ".secret",
    "original/tokenizer.model",
    "tokenizer/vocab.json",
    "additional_chat_templates/notes.txt",
]


def folder_of(path: Path, names: list[str], **settings: Any) -> Path:
    """A folder of files that hold their names."""
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(name)
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def found(path: Path) -> set[str]:
    return {file.as_posix() for file in companions(path)}


def test_known_names_and_no_others(tmp_path: Path) -> None:
    assert found(folder_of(tmp_path, KNOWN + STRANGE)) == set(KNOWN)


def test_they_are_in_the_result(stories_path: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    shutil.copytree(stories_path, tmp_path / "model")
    own = {*KNOWN} - {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    strange = {*STRANGE} - {"config.json", "model.safetensors", "model.safetensors.index.json"}
    for name in own | strange:
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_text(name)
    slimllm.prune(tmp_path / "model", tmp_path / "out", config(token_ids))
    out = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    made = {"README.md", "report.json", "slim_layers.py"}  # by ourselves
    assert own <= out and not out & (strange - made)
    for name in own:
        assert (tmp_path / "out" / name).read_text() == name
    assert "class SlimConfig" in (tmp_path / "out" / "slim_layers.py").read_text()


def test_files_that_the_settings_name(tmp_path: Path) -> None:
    names = ["foo.words", "first.tab", "second.tab", "unnamed.tab", "config.json", "model.safetensors", "thesis.txt"]
    settings = {
        "vocab_file": "foo.words",
        "tables": ["first.tab", "second.tab", 3],
        "a": "config.json",
        "b": "model.safetensors",
        "c": "*.txt",
        "d": "../thesis.txt",
        "e": "sub/thesis.txt",
        "f": {"g": "unnamed.tab"},
        "h": "not there.tab",
    }
    folder = folder_of(tmp_path, names, **settings)
    assert found(folder) == {"tokenizer_config.json", "foo.words", "first.tab", "second.tab"}
    assert files_to_fetch(folder) == {"not there.tab"}


@pytest.mark.parametrize(
    ("class_name", "files"),
    [
        ("MyT5Tokenizer", {"byte_maps.json"}),
        ("ProphetNetTokenizer", {"prophetnet.tokenizer"}),
        ("Qwen2Tokenizer", set()),
        ("Nonsense", set()),
        ("../Nonsense", set()),
        (None, set()),
        (["MyT5Tokenizer"], set()),
    ],
)
def test_files_of_the_class(tmp_path: Path, class_name: Any, files: set[str]) -> None:
    folder = folder_of(tmp_path, ["byte_maps.json", "prophetnet.tokenizer", "thesis.txt"], tokenizer_class=class_name)
    assert found(folder) == {"tokenizer_config.json", *files}


@pytest.mark.parametrize(
    ("auto_map", "code"),
    [
        ({"AutoTokenizer": ["tokenization_mine.MyTokenizer", None]}, {"tokenization_mine.py", "helper.py"}),
        ({"AutoTokenizer": "tokenization_mine.MyTokenizer"}, {"tokenization_mine.py", "helper.py"}),
        (["tokenization_mine.MyTokenizer", None], {"tokenization_mine.py", "helper.py"}),
        ({"AutoTokenizer": ["someone/else--tokenization_mine.MyTokenizer", None]}, set()),
        ({"AutoTokenizer": ["modeling_mine.MyTokenizer", "slim_layers.MyTokenizer"]}, set()),
        ({"AutoModel": "other.Model"}, set()),
        ({"AutoTokenizer": ["../../other.MyTokenizer", 5]}, set()),
        (5, set()),
    ],
)
def test_code_of_a_tokenizer_is_copied_and_not_run(tmp_path: Path, auto_map: Any, code: set[str]) -> None:
    names = ["tokenization_mine.py", "helper.py", "modeling_mine.py", "slim_layers.py", "other.py"]
    folder = folder_of(tmp_path / "in", names, auto_map=auto_map)
    text = "import torch\nfrom .helper import x\nfrom .modeling_mine import y\nraise SystemExit\n"
    (folder / "tokenization_mine.py").write_text(text)
    (tmp_path / "out").mkdir()
    copy_companions(folder, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tokenizer_config.json", *code}
    assert not code or (tmp_path / "out" / "tokenization_mine.py").read_text() == text


@pytest.mark.parametrize("content", ["nonsense", "[]", "\udcff", '{"vocab_file": null, "auto_map": {}}'])
def test_settings_that_say_nothing(tmp_path: Path, content: str) -> None:
    folder = folder_of(tmp_path, ["vocab.json", "thesis.txt"])
    (folder / "tokenizer_config.json").write_text(content, errors="surrogateescape")
    assert found(folder) == {"tokenizer_config.json", "vocab.json"}


def test_links(tmp_path: Path) -> None:
    """Those into the hub's cache of the model are followed, and those inside its folder; others are said, and left out."""
    cache = tmp_path / "models--me--mine"
    folder = folder_of(cache / "snapshots" / "abc", ["real.model", "vocab.txt"])
    secret = folder_of(tmp_path / "elsewhere", ["secret"]) / "secret"
    (cache / "blobs").mkdir()
    blob = "0123456789abcdef" * 4
    (cache / "blobs" / blob).write_text("a blob")
    (folder / "tokenizer.json").symlink_to(f"../../blobs/{blob}")
    (folder / "inside.model").symlink_to("real.model")
    (folder / "outside.model").symlink_to(secret)
    (secret.parent / "shared.model").write_text("of several folders")
    (folder / "shared.model").symlink_to(secret.parent / "shared.model")
    (secret.parent / "id_rsa").write_text("of the user")
    (folder / "id_rsa").symlink_to(secret.parent / "id_rsa")
    (folder / "tokenizer_config.json").write_text('{"x": "id_rsa"}')
    (folder / "relative.model").symlink_to("../../../elsewhere/secret")
    (folder / "nowhere.model").symlink_to("nowhere")
    (folder / "additional_chat_templates").symlink_to(secret.parent)
    (secret.parent / "x.jinja").write_text("secret")
    (folder / "NOTICE").symlink_to(secret)
    (folder / "LICENSE").symlink_to("LICENSE.txt")
    (folder / "LICENSE.txt").symlink_to("LICENSE")
    os.mkfifo(folder / "USE_POLICY.md")
    (folder / "merges.txt").symlink_to("/dev/zero")
    with (folder / "vocab.json").open("wb") as sparse:
        sparse.truncate(2**29)
    kept = {"tokenizer_config.json", "tokenizer.json", "real.model", "inside.model", "vocab.txt"}
    assert found(folder) == kept
    for name, fault in (
        ("additional_chat_templates/x.jinja", "is a link that leads out of its folder"),
        ("id_rsa", "is a link that leads out of its folder"),
        ("merges.txt", "is a device or a pipe, not a file"),
        *((f"{name}.model", "is a link that leads out of its folder") for name in ("outside", "relative", "shared")),
        ("vocab.json", "is larger than any such file"),
    ):
        with pytest.raises(InputError, match=f"{name} {fault}, so it cannot be copied to the result; put a copy"):
            left_out(folder)
        (folder / name).unlink() if "/" not in name else (folder / "additional_chat_templates").unlink()
    said = left_out(folder)
    for name in ("NOTICE is a link that leads", "USE_POLICY.md is a device", "nowhere.model is a link to nothing"):
        assert any(f"/{name}" in sentence and "so it is not copied" in sentence for sentence in said), name
    assert len(said) == 5  # and the two licences that are links to each other
    (tmp_path / "link").symlink_to(folder)
    assert found(tmp_path / "link") == kept
    (tmp_path / "out").mkdir()
    copy_companions(folder, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "a blob"
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_a_download_fetches_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their patterns at once; what only the settings name, in a second go, and once."""
    named = ["foo.words", "tokenization_mine.py", "helper.py"]
    hub = folder_of(
        tmp_path / "hub",
        [*KNOWN, *STRANGE, *named],
        vocab_file="foo.words",
        missing="missing.tab",
        auto_map={"AutoTokenizer": ["tokenization_mine.MyTokenizer", None]},
    )
    (hub / "tokenization_mine.py").write_text("from .helper import x\n")
    here = tmp_path / "here"
    calls = []

    def snapshot_download(model: str, allow_patterns: list[str], revision: str | None) -> str:
        assert (model, revision) == ("me/mine", "v1.0" if not calls else here.name)  # what follows is of the same commit
        calls.append(allow_patterns)
        for path in hub.rglob("*"):
            name = path.relative_to(hub).as_posix()
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (here / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, here / name)
        return str(here)

    monkeypatch.setattr(opening, "snapshot_download", snapshot_download)
    assert opening.download("me/mine@v1.0") == here
    fetched = {path.relative_to(here).as_posix() for path in here.rglob("*") if path.is_file()}
    assert {*KNOWN, *named} <= fetched
    assert not fetched & {"thesis.txt", "notes.json", "modeling_mine.py", "configuration_mine.py", "pytorch_model.bin"}
    assert len(calls) == 3 and calls[2] == ["helper.py"]
    assert found(here) == {*KNOWN, *named}
    calls.clear()
    opening.download("me/mine@v1.0", only=("config.json",))
    assert calls == [["config.json"]]
