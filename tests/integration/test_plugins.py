"""Methods of others: in a package of their own, in a file, as the documentation says; their options on the command line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call
from conftest import STORIES, config, stop_at

import slimllm
from slimllm import InputError, PruneConfig
from slimllm.methods.criteria import Criterion, register_criterion
from slimllm.methods.recovery import Recovery
from slimllm.plugins import CRITERIA, Registry, import_plugin

PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "their-pruning"
version = "3.1"
[project.entry-points."slimllm.criteria"]
their-score = "their_pruning:TheirScore"
[tool.setuptools]
py-modules = ["their_pruning"]
"""


MODULE = '''
"""A package that knows slimllm; slimllm does not know it."""

from dataclasses import dataclass

from slimllm.methods.criteria import Criterion


class TheirScore(Criterion):
    """The largest activations stay."""

    version = "3"

    @dataclass(frozen=True)
    class Settings:
        power: float = 1.0

    def scores(self, sublayer, statistics):
        return (statistics.columns.norms() ** self.settings.power).view(sublayer.units, -1).sum(1)
'''


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the package is installed."""
    source, site = tmp_path_factory.mktemp("theirs"), tmp_path_factory.mktemp("site")
    (source / "pyproject.toml").write_text(PYPROJECT)
    (source / "their_pruning.py").write_text(MODULE)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True, capture_output=True)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.slow
def test_a_package_of_others(installed: dict[str, str], tmp_path: Path) -> None:
    """Prunes, is killed, goes on, shows in report and page, and is exported."""

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "slimllm", *map(str, words)]
        return subprocess.run(command, cwd=tmp_path, env=installed, capture_output=True, text=True)

    prune = ["prune", STORIES, "--out", "out", "--ratio", "0.3", "--criterion", "their-score", "--their-score.power", "2"]
    prune += ["--samples", "40", "--seq-len", "512", "--batch-size", "1"]  # long enough to be met at work
    command = [sys.executable, "-m", "slimllm", *map(str, prune)]
    running = subprocess.Popen(command, cwd=tmp_path, env=installed, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    journal, deadline = tmp_path / ".out.partial" / "journal.jsonl", time.monotonic() + 120
    while running.poll() is None and time.monotonic() < deadline:
        if journal.is_file() and len(journal.read_bytes().splitlines()) > 2:
            break
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL and journal.is_file()
    other = run(*(word for word in prune if word not in ("--their-score.power", "2")), "--resume")
    assert other.returncode == 2 and "another method_settings" in other.stderr, other.stderr
    done = run(*prune, "--resume")
    assert done.returncode == 0, done.stderr
    report = slimllm.PruneReport.read(tmp_path / "out")
    assert report.resumed_steps and report.config["criterion"] == "their-score"
    assert report.config["method_settings"]["criterion"] == {"power": 2.0}
    assert report.config["method_versions"]["criterion"] == "3"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "those that the criterion their-score chose" in page and "criterion their-score (power 2.0)" in page
    assert "--their-score.power 2" in (tmp_path / "out" / "README.md").read_text()
    exported = run("export", "out", "--to", "gguf", "--out", "m.gguf")
    assert exported.returncode == 0 and (tmp_path / "m.gguf").is_file(), exported.stderr


def test_the_package_from_python(installed: dict[str, str], tmp_path: Path) -> None:
    code = f"""
import slimllm
from their_pruning import TheirScore
by_name = slimllm.PruneConfig(0.3, 'slimllm', samples=4, criterion="their-score")
assert by_name.criterion == TheirScore() and by_name.criterion != TheirScore(power=3)
slimllm.prune({str(STORIES)!r}, "by_name", by_name)
slimllm.prune({str(STORIES)!r}, "made", slimllm.PruneConfig(0.3, "slimllm", samples=4, criterion=TheirScore()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=installed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for shard in (tmp_path / "by_name").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "made" / shard.name).read_bytes()


def test_the_documentation(forgotten: None, token_ids: torch.Tensor, tmp_path: Path) -> None:
    """Every class in docs/extending/methods.md and the README is pruned with, or registered at least."""
    root = Path(__file__).parents[2]
    for document in (root / "docs" / "extending" / "methods.md", root / "README.md"):
        for code in re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL):
            if "@register_" in code and "Exporter" not in code:
                exec(compile(code, document.name, "exec"), {"__name__": __name__, **_IMPORTED})
    for kind, names in {
        "criterion": ("my-score", "the-first", "largest-activations"),
        "recovery": ("half-bias",),
        "allocation": ("smallest-weights",),
    }.items():
        for name in names:
            report = slimllm.prune(STORIES, tmp_path / name, config(token_ids, head_unit="query", **{kind: name}))
            assert report.config[kind] == name and report.achieved_ratio == pytest.approx(0.3, rel=0.02)


_IMPORTED = {"torch": torch, "Criterion": Criterion, "register_criterion": register_criterion}


def test_an_exporter(forgotten: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one in docs/extending/methods.md."""
    text = (Path(__file__).parents[2] / "docs" / "extending" / "methods.md").read_text()
    code = text[text.index("from slimllm.export import") :].partition("```")[0]
    (tmp_path / "sizes.py").write_text(code)
    words = ("export", STORIES, "--to", "sizes", "--out", tmp_path / "sizes.txt", "--plugin", tmp_path / "sizes.py")
    done, out, err = call(capsys, *words)
    assert done == 0 and "with the architecture llama" in out, err
    assert (tmp_path / "sizes.txt").read_text() == "8 heads, 172 channels\n" * 5
    done, _, err = call(capsys, *words[:3], "text", *words[4:])
    assert done == 2 and "exporter must be one of gguf, padded, sizes, stock, got 'text'" in err


def test_names(forgotten: None) -> None:
    with pytest.raises(ValueError, match="has the characters a-z, 0-9 and -, got 'My Score'"):
        register_criterion("My Score")
    with pytest.raises(ValueError, match="there is a criterion obs already, slimllm"):
        register_criterion("obs")(type("Other", (Criterion,), {}))
    with pytest.raises(TypeError, match=r"a criterion is a subclass of slimllm\.methods\.criteria\.base\.Criterion"):
        register_criterion("other")(Recovery)  # type: ignore[type-var]
    with pytest.raises(InputError, match=r"The plug-in no_such_module cannot be imported \(ModuleNotFoundError"):
        import_plugin("no_such_module")
    with pytest.raises(InputError, match=r"cannot be imported \(ImportError: there is no file"):
        import_plugin("no/such/file.py")
    with pytest.raises(TypeError, match="criterion must be a name or a registered criterion"):
        PruneConfig(0.2, criterion=Criterion())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--slimllm.keep-lowest", "0.5", "--criterion", "obs"], "is an option of slimllm, which this run does not use"),
        (["--slimllm.lowest", "0.5"], "there are --slimllm.keep-lowest, --layer-importance.pruned-layers"),
        (["--slimllm.keep-lowest", "x"], "--slimllm.keep-lowest must be a number, got 'x'"),
        (["--layer-importance.pruned-layers", "2.5"], "--layer-importance.pruned-layers must be an integer, got '2.5'"),
        (["--slimllm.keep-lowest"], "--slimllm.keep-lowest needs a value"),
        (["--layer-importance.published", "maybe"], "unexpected extra arg"),
        (["--alpha", "5"], "There is no option --alpha. Did you mean --layer-importance.alpha?"),
        (["more"], "unexpected extra arg"),
        (["--unknown", "5"], "no option --unknown. Options of a method are written --METHOD.OPTION VALUE."),
        (["--sampels", "5"], "There is no option --sampels. Did you mean --samples?"),
        (["--plugin", "no_such_module"], "The plug-in no_such_module cannot be imported"),
        (["--recovery", "other"], "recovery must be one of affine, bias, lstsq, none, got 'other'"),
    ],
)
def test_options_that_cannot_be(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(
        capsys, "prune", STORIES, "--out", tmp_path / "out", "--ratio", "0.2", "--preset", "slimllm", *words
    )
    assert code == 2 and sentence in " ".join(err.replace("│", " ").split()), err
    assert not (tmp_path / "out").exists()


def test_options_of_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--preset",
        "paper",
        "--layer-importance.alpha=0",
        "--slimllm.keep-lowest",
        "0.25",
        "--samples",
        "4",
        "--quiet",
    ]
    code, _, err = call(capsys, "prune", STORIES, "--out", tmp_path / "out", "--ratio", "0.2", *words, "--no-page")
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["config"]["method_settings"] == {
        "criterion": {"keep_lowest": 0.25},
        "recovery": {},
        "allocation": {"pruned_layers": None, "alpha": 0.0, "published": True},
    }
    assert report["allocation"]["alpha"] == 0


def test_code_is_part_of_a_run(forgotten: None, token_ids: torch.Tensor, tmp_path: Path) -> None:
    """What a mistake has ended leaves nothing, and what was interrupted is not resumed by other code."""
    file = tmp_path / "mine.py"
    text = """
from slimllm.methods.criteria import Criterion, register_criterion
@register_criterion("mine")
class Mine(Criterion):
    def scores(self, sublayer, statistics):
        if sublayer.index == 3:
            raise RuntimeError("a mistake")
        return statistics.columns.norms().view(sublayer.units, -1).sum(1)
"""

    for version, number in enumerate((3, 9, 8)):
        file.write_text(text.replace("index == 3", f"index == {number}"))
        import_plugin(str(file))
        settings = config(token_ids, criterion="mine")
        if version == 0:
            with pytest.raises(InputError, match=r"failed in the attention of layer 3 \(RuntimeError: a mistake\)"):
                slimllm.prune(STORIES, tmp_path / "out", settings)
            assert not (tmp_path / ".out.partial").exists()
        elif version == 1:
            with pytest.raises(KeyboardInterrupt):
                slimllm.prune(STORIES, tmp_path / "out", settings, progress=stop_at("prune", 1))
            assert (tmp_path / ".out.partial").exists()
        else:
            with pytest.raises(InputError, match="had another code of the methods"):
                slimllm.prune(STORIES, tmp_path / "out", settings, resume=True)


def test_a_broken_entry_point_is_said_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    entries = [EntryPoint("broken", "no_such_module:X", "g"), EntryPoint("good", "test_plugins:Good", "g")]
    entries.append(EntryPoint("renamed", "slimllm.methods.criteria.obs:Obs", "g"))
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: entries)
    registry: Registry[Any] = Registry("criterion", "slimllm.methods.criteria", "g")
    monkeypatch.setattr(registry, "_found", dict(CRITERIA.all()))
    assert registry.make("good").name == "good" and registry.make("flap").name == "flap"
    with pytest.raises(InputError, match="The criterion broken cannot be imported"):
        registry.make("broken")
    with pytest.raises(InputError, match="it is registered as obs; give the entry point that name"):
        registry.make("renamed")


class Good(Criterion):
    """Of an entry point."""


@pytest.mark.parametrize(
    "words", [["--slimllm.keep-lowest", "0.25"], ["--slimllm.keep-lowest=0.25", "--layer-importance.published"]]
)
def test_options_stand_anywhere(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = ("--ratio", "0.2", "--preset", "slimllm", "--out", tmp_path / "out", "--samples", "4", "--quiet")
    code, _, err = call(capsys, "prune", *words, STORIES, *others)
    assert code == 0, err
    assert slimllm.PruneReport.read(tmp_path / "out").config["method_settings"]["criterion"] == {"keep_lowest": 0.25}
