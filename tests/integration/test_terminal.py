"""What is printed: the user's strings as they are, a terminal that is lost, and the habits of other programs."""

from __future__ import annotations

import io
import json
import logging
import os
import pydoc
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import call
from conftest import STORIES
from rich.console import Console

import slimllm
from slimllm import InputError, PruneConfig
from slimllm.cli.terminal import Notices
from slimllm.methods.allocation.removal import LayerShape
from slimllm.methods.allocation.target import find_target
from slimllm.runtime.distributed import Ranks

QUICK = ("--samples", "4", "--seq-len", "32")


@pytest.mark.parametrize("name", ["slim[v2]:smile:[/v2]"])
def test_names_are_not_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Brackets and colons in a path must not become a style, an emoji or a crash after the work."""
    model, out = tmp_path / "in" / name, tmp_path / "out" / name
    shutil.copytree(STORIES, model)
    commands: list[tuple[list[str | Path], Path]] = [
        (["prune", model, "--out", out, "--ratio", "0.2", "--uniform", *QUICK], out),
        (["eval", model, out, "--max-windows", "2"], out),
        (["report", out, "--no-sample"], out),
        (["export", out, "--to", "padded", "--out", tmp_path / "padded" / name], tmp_path / "padded" / name),
        (["plan", model, "--device", "cuda"], model),
    ]
    for arguments, said in commands:
        code, printed, err = call(capsys, *arguments)
        assert code == 0, err
        assert str(said) in "".join(printed.split("\n")) or f"{name}" in printed, printed
    code, _, err = call(capsys, "eval", tmp_path / "missing" / name)
    assert code == 2 and name in err


def shell(command: str, folder: Path) -> tuple[int, str]:
    """The exit code of the first program of a pipe, and what is on stderr."""
    environment = {**os.environ, "SLIMLLM": f"{sys.executable} -m slimllm", "MODEL": str(STORIES), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        ["bash", "-c", f"{command}; echo ${{PIPESTATUS[0]}} > code"],
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = [line for line in done.stderr.splitlines(True) if not line.startswith("Other work kept")]  # as there may be
    return int((folder / "code").read_text()), "".join(lines)


def test_nobody_reads_what_is_printed(tmp_path: Path) -> None:
    code, err = shell("$SLIMLLM prune $MODEL --out out --ratio 0.2 --samples 4 | true", tmp_path)
    assert (code, err) == (0, "") and (tmp_path / "out" / "report.html").is_file()


def test_the_disk_of_the_output_is_full(tmp_path: Path) -> None:
    code, err = shell("$SLIMLLM prune $MODEL --out out --ratio 0.2 --samples 4 > /dev/full", tmp_path)
    assert code == 2 and err == "Error: Printed output was lost (No space left on device); everything else is done.\n"
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.slow
def test_no_output_at_all(tmp_path: Path) -> None:
    code, err = shell("$SLIMLLM prune $MODEL --out out --ratio 0.2 --samples 4 <&- >&-", tmp_path)
    assert (code, err) == (0, "") and (tmp_path / "out" / "report.html").is_file()


def test_habits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for name, arguments in (
        ("plain", ["--out", "OUT", "--ratio", "0.3"]),
        ("short", ["-o", "OUT", "--sparsity", "30%"]),
        ("long", ["--output", "OUT", "--ratio", "30%", "--host-memory", "8G"]),
    ):
        out = tmp_path / name
        code, _, err = call(capsys, "prune", STORIES, *QUICK, *(str(out) if one == "OUT" else one for one in arguments))
        assert code == 0, err
        found[name] = json.loads((out / "report.json").read_text())
    assert all(report["config"]["ratio"] == 0.3 for report in found.values())
    assert all(report["parameters"] == found["plain"]["parameters"] for report in found.values())
    code, _, err = call(capsys, "prune", STORIES, "--out", tmp_path / "x", "--ratio", "30")
    assert code == 2 and "got 30.0 (30 % is 0.3)" in err
    code, _, err = call(capsys, "prune", STORIES, "--out", tmp_path / "x", "--ratio", "much")
    assert code == 2 and "'much' is not a number" in err


@pytest.mark.parametrize("command", ["prune", "plan", "eval", "export", "finetune", "compare", "sweep", "latency"])
def test_usage_says_model(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = call(capsys, command, "--help")
    assert code == 0 and re.search(rf"Usage: .*slimllm {command} \[OPTIONS\] [{{\[]?MODEL\b", out)


def test_help_of_the_package_shows_the_interface_first() -> None:
    described = pydoc.plain(pydoc.render_doc(slimllm)).partition("PACKAGE CONTENTS")[0]
    assert all(re.search(rf"\b{name}\b", described) for name in slimllm.__all__)


def test_completion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--help")
    assert code == 0 and "--install-completion" in out


def test_the_preset_paper_speaks_of_the_ratio_that_was_asked_for() -> None:
    shape = LayerShape(
        units=4,
        unit_params=1000,
        channels=64,
        channel_params=100,
        params=10_400,
        attention_bias_params=0,
        ffn_bias_params=0,
        grouped=False,
        unit_step=1,
    )
    with pytest.raises(InputError, match=r"^A ratio of 0\.999 with the preset paper \(0\.989 of .* is more than"):
        find_target([shape] * 10, PruneConfig(ratio=0.999, preset="paper"))


def printed(log: Callable[[logging.Logger], None], quiet: bool = False, name: str = "slimllm") -> tuple[str, str]:
    """What a command prints, on its two streams, of what is logged meanwhile."""
    out, err = (Console(file=io.StringIO(), width=60, markup=False) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slimllm.cli.terminal.errors", err)
        with Notices(out, quiet):
            log(logging.getLogger(name))
    return out.file.getvalue(), err.file.getvalue()  # type: ignore[attr-defined]


def test_what_is_logged_is_printed() -> None:
    sentence = "A sentence that is longer than the terminal is wide, of 100 % and [brackets], is not broken."
    assert printed(lambda logger: logger.info(sentence)) == (f"{sentence}\n", "")
    assert printed(lambda logger: logger.info(sentence), quiet=True) == ("", "")
    assert printed(lambda logger: logger.warning(sentence), quiet=True) == ("", f"{sentence}\n")
    assert printed(lambda logger: logger.error(sentence)) == ("", f"{sentence}\n")
    assert printed(lambda logger: logger.info("twice") or logger.info("twice")) == ("twice\ntwice\n", "")
    assert printed(lambda logger: logger.info("a kernel runs"), name="slimllm.ops") == ("", "")
    assert printed(lambda logger: logger.warning("a kernel fails"), name="slimllm.ops") == ("a kernel fails\n", "")


def test_the_logger_is_left_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    """And a handler of the root, which a plug-in may have made, prints nothing a second time."""
    logger, root = logging.getLogger("slimllm"), logging.getLogger()
    handler = logging.StreamHandler()
    root.addHandler(handler)
    before = logger.level, logger.propagate, list(logger.handlers)
    try:
        assert printed(lambda logger: logger.warning("once"))[0] == "once\n"
        assert "once" not in capsys.readouterr().err
    finally:
        root.removeHandler(handler)
    assert (logger.level, logger.propagate, list(logger.handlers)) == before


def test_a_message_that_cannot_be_made_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(lambda logger: logger.info("%d", "x")) == ("", "")


def test_other_processes_log_errors_alone(told: list[str]) -> None:
    ranks, logger = Ranks(), logging.getLogger("slimllm")
    ranks.rank = 1
    with ranks.one_log():
        logger.warning("few tokens")
        logger.error("a plug-in failed")
        logging.getLogger("slimllm.ops").warning("the kernel does not run here")
    logger.info("afterwards")
    assert told == ["a plug-in failed", "the kernel does not run here", "afterwards"]
