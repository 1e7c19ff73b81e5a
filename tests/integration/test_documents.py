"""The README and the documentation: their code runs as it stands, their links lead somewhere, the README stays short."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from commands import call
from conftest import STORIES

import slimllm
from slimllm.calibration import bundled_text
from slimllm.models.families import CONTAINERS, FAMILIES

ROOT = Path(slimllm.__file__).parents[1]
GUIDES = [
    ROOT / "README.md",
    ROOT / "docs" / "getting-started.md",
    *(page for page in sorted((ROOT / "docs" / "guides").glob("*.md")) if page.stem != "several-gpus"),
]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted((ROOT / "docs").rglob("*.md"))
_BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "model-slim"
    slimllm.prune(STORIES, out, slimllm.PruneConfig(ratio=0.3, samples=8, seq_len=64))
    return out


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_the_code_runs(
    forgotten: None,
    page: Path,
    pruned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All Python blocks of a page one after the other, and every command of slimllm, where there are such files."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(STORIES, "path/to/model")
    text = page.read_text(encoding="utf-8")
    if "--out model-slim " not in text:
        shutil.copytree(pruned, "model-slim")
    Path("your-text.txt").write_text(bundled_text("calibration")[:60_000])
    Path("held-out.txt").write_text(bundled_text("evaluation")[:20_000])
    answers = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n)))} for n in range(2, 30)]
    Path("examples.jsonl").write_text("\n".join(map(json.dumps, answers)))
    names: dict[str, object] = {"__name__": "__page__"}
    blocks = _BLOCK.findall(text)
    assert blocks
    for kind, code in blocks:
        if kind == "python":
            exec(compile(code, str(page), "exec"), names)
            continue
        for line in code.splitlines():
            if line.startswith("slimllm "):
                exit_code, _, err = call(capsys, *shlex.split(line, comments=True)[1:])
                assert exit_code == 0, f"{line}: {err}"


@pytest.mark.slow
def test_the_notebook_runs(forgotten: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, object] = {"__name__": "__notebook__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "quickstart.ipynb", "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_page_is_in_the_menu() -> None:
    menu = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert menu == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}


def test_every_family_is_in_the_table() -> None:
    lines = (ROOT / "docs" / "reference" / "families.md").read_text().splitlines()
    rows = {line.split("`")[1]: line for line in lines if line.startswith("| `") and "model_type" not in line}
    assert set(rows) == {*(spec.name for spec in FAMILIES.values()), "phi3", *CONTAINERS}
    assert all(line.count("|") == 9 for line in rows.values())
