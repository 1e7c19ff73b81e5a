"""No command runs Python of a model's folder, and none asks whether it may, unless --trust-remote-code says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call
from conftest import STORIES, config

import slimllm

CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class XTokenizerFast(PreTrainedTokenizerFast):
    pass
class XConfig(LlamaConfig):
    pass
class XForCausalLM(LlamaForCausalLM):
    pass
def generate(inputs=None, model=None, **settings):
    Path({mark!r}).touch()
    return type(model).generate(model, inputs, **settings)
"""
# Escapes from templates that are not sandboxed.
TEMPLATE = (
    "{{% for s in ''.__class__.__mro__[1].__subclasses__() %}}{{% if s.__name__ == 'Popen' %}}"
    "{{{{ s(['touch', {mark!r}]).wait() }}}}{{% endif %}}{{% endfor %}}"
    "{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}"
)


@pytest.fixture(scope="module")
def pruned(token_ids: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign") / "pruned"
    slimllm.prune(STORIES, folder, config(token_ids, ratio=0.2))
    return folder


def change(file: Path, **settings: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **settings}))


def hostile(source: Path, folder: Path, mark: Path, fast: bool = True) -> Path:
    """A model's folder with code in all places from which transformers takes some."""
    shutil.copytree(source, folder)
    code = CODE.format(mark=str(mark))
    for name in ("tokenization_x.py", "modeling_x.py", "configuration_x.py"):
        (folder / name).write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    change(
        folder / "tokenizer_config.json",
        tokenizer_class="XTokenizerFast",
        auto_map={"AutoTokenizer": [None, "tokenization_x.XTokenizerFast"]},
        chat_template=TEMPLATE.format(mark=str(mark)),
    )
    change(
        folder / "config.json",
        auto_map={"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"},
    )
    if not fast:
        (folder / "tokenizer.json").unlink()
    return folder


COMMANDS = ("prune", "prune, chat", "plan", "export", "compare", "sweep", "eval", "latency", "finetune", "report", "bench")


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that any of the code makes; and a user who answers every question with yes."""
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    return tmp_path / "RAN"


def commands(folder: Path, tmp_path: Path) -> dict[str, list[str | Path]]:
    text, story = tmp_path / "chat.jsonl", tmp_path / "story.txt"
    story.write_text("Once upon a time there was a girl. " * 400)
    chat = {"messages": [{"role": "user", "content": "Once upon a time there was a girl. " * 20}]}
    text.write_text("\n".join([json.dumps(chat)] * 40))
    few = ["--samples", "4", "--seq-len", "32"]
    return {
        "prune": ["prune", folder, "--out", tmp_path / "out", "--ratio", "0.2", *few],
        "prune, chat": ["prune", folder, "--out", tmp_path / "o2", "--ratio", "0.2", *few, "--calibration", text],
        "plan": ["plan", folder],
        "export": ["export", folder, "--to", "stock", "--out", tmp_path / "stock"],
        "compare": ["compare", folder, "--ratio", "0.2", "--method", "random", "--max-windows", "2", *few],
        "sweep": [
            "sweep",
            folder,
            "--ratio",
            "0.2",
            "--max-windows",
            "2",
            "--rounds",
            "1",
            "--prompt",
            "8",
            "--new-tokens",
            "2",
            "--out",
            tmp_path / "sweep",
            *few,
        ],
        "eval": ["eval", folder, "--max-windows", "2"],
        "latency": ["latency", folder, "--prompt", "8", "--new-tokens", "2", "--rounds", "1"],
        "finetune": ["finetune", folder, "--data", story, "--out", tmp_path / "tuned", "--max-steps", "1"],
        "report": ["report", folder],
        "bench": ["bench", folder, "--samples", "4", "--seq-len", "32", "--out", tmp_path / "bench.jsonl"],
    }


# The slow ones load models as prune, eval and latency do.
SLOW = ("sweep", "bench")


@pytest.mark.parametrize("command", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in COMMANDS])
def test_no_command_runs_it(
    command: str, pruned: Path, tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fast tokenizer is read without its code; of a pruned model the format is ours."""
    folder = hostile(pruned if command == "report" else STORIES, tmp_path / "m", mark)
    code, _, err = call(capsys, *commands(folder, tmp_path)[command])
    assert not mark.exists()
    if command == "prune, chat":  # a template that wants out of its sandbox
        assert code == 2 and "chat template does not take the messages" in err
    else:
        assert code == 0, err


@pytest.mark.parametrize("command", ["prune", "eval", "finetune"])
def test_a_tokenizer_that_is_code_alone(
    command: str, tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = hostile(STORIES, tmp_path / "m", mark, fast=False)
    code, _, err = call(capsys, *commands(folder, tmp_path)[command])
    assert code == 2 and "tokenization_x.XTokenizerFast), which is not run" in err and not mark.exists()


@pytest.mark.parametrize("command", ["eval", "latency", "finetune", "report"])
def test_it_runs_when_it_is_trusted(
    command: str, pruned: Path, tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = hostile(pruned if command == "report" else STORIES, tmp_path / "m", mark)
    _, _, err = call(capsys, *commands(folder, tmp_path)[command], "--trust-remote-code")
    assert mark.exists(), err


def test_a_model_type_that_only_its_code_knows(tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = hostile(STORIES, tmp_path / "m", mark)
    change(folder / "config.json", model_type="xllama")
    code, _, err = call(capsys, "eval", folder)
    assert code == 2 and "cannot be loaded" in err and "--trust-remote-code" in err and not mark.exists()
    code, _, err = call(capsys, "prune", folder, "--out", tmp_path / "out", "--ratio", "0.2")
    assert code == 2 and "'xllama' are not supported" in err and not mark.exists()


def test_settings_beside_a_gguf_file_are_not_its_own(tmp_path: Path, mark: Path) -> None:
    from slimllm.export.api import export

    export(STORIES, tmp_path / "m.gguf", "gguf")
    folder = hostile(STORIES, tmp_path / "m", mark)
    (tmp_path / "m.gguf").rename(folder / "m.gguf")
    _, tokenizer = slimllm.load(folder / "m.gguf")
    assert not mark.exists() and type(tokenizer).__name__ != "XTokenizerFast"
    assert tokenizer("Once upon")["input_ids"] == slimllm.load(STORIES)[1]("Once upon")["input_ids"]
