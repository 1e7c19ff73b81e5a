"""The page about a pruned model: what it says, that it needs nothing else, and, in Chromium, that it can be read."""

from __future__ import annotations

import io
import json
import re
import shutil
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call
from conftest import STORIES, config
from matplotlib import image
from safetensors.torch import load_file, save_file

from slimllm import prune
from slimllm.errors import InputError
from slimllm.finetuning import FinetuneConfig, finetune
from slimllm.pruning.report import PruneReport
from slimllm.report import Sample, make_sample, write_page
from slimllm.report.figures import PICTURES


class Parsed(HTMLParser):
    """Tags with their attributes, and the text outside of styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self._in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        self.words += "" if self._in_style else data


def pruned_into(out: Path, token_ids: torch.Tensor, **settings: Any) -> Path:
    prune(STORIES, out, config(token_ids, **settings))
    return out


@pytest.fixture(scope="module")
def folder(token_ids: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned and trained model with its page; `report.json` says what the pruning did."""
    parent = tmp_path_factory.mktemp("page")
    pruned = pruned_into(parent / "pruned", token_ids, ratio=0.4)
    data = parent / "text.txt"
    data.write_text("Once upon a time there was a little dog who lived in a big house. " * 200)
    finetune(pruned, data, parent / "out", FinetuneConfig(seq_len=32, max_steps=4, save_every=2))
    write_page(parent / "out", make_sample(parent / "out", STORIES, "Once upon a time, there was a"))
    return parent / "out"


def test_it_needs_nothing_else(folder: Path) -> None:
    """No script, no address but names within the page and empty data."""
    page = Parsed(text := (folder / "report.html").read_text())
    assert not {"script", "img", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            if (value := attributes.get(name)) is not None:
                assert value.startswith("#") or value == "data:,", value
    assert "@import" not in text and not re.search(r"url\((?!#)", text)


def test_what_it_says(folder: Path) -> None:
    report, page = PruneReport.read(folder), Parsed((folder / "report.html").read_text())
    assert page.words.count(" % and trained") == 2 and "without the training" in page.words  # title and heading
    for number in (
        f"{report.parameters['before']:,}",
        f"{report.parameters['after']:,}",
        f"{report.calibration['perplexity_pruned']:.2f}",
        f"pruned by {100 * report.achieved_ratio:.1f} %",
        f"{sum(layer['num_heads'] for layer in report.layers)}",
        "Once upon a time, there was a",
        "LoRA of rank 4",
    ):
        assert number in page.words, number
    pictures = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert pictures == [f"{picture.title}. {picture.caption}" for picture in PICTURES]
    identifiers = [attributes["id"] for tag, attributes in page.tags if tag == "section" and "id" in attributes]
    assert identifiers == [picture.name for picture in PICTURES]


def test_identifiers_are_its_own(folder: Path) -> None:
    page = Parsed((folder / "report.html").read_text())
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    used = [value for _, attributes in page.tags if (value := attributes.get("xlink:href")) is not None]
    assert used and {value[1:] for value in used} <= set(identifiers)


def test_colours_follow_the_style(folder: Path) -> None:
    """Nothing that is drawn has a colour of its own."""
    text = (folder / "report.html").read_text()
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    assert drawings.count("var(--first)") > 10 and drawings.count("var(--ink)") > 10
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawings)) <= {"#000000"}  # what matplotlib sets and nothing is drawn with


def test_pictures(folder: Path) -> None:
    for picture in PICTURES:
        content = (folder / "report" / f"{picture.name}.png").read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        assert content.startswith(b"\x89PNG") and width > 600 and height > 200
        colours = image.imread(io.BytesIO(content))[..., :3]
        assert (abs(colours - colours.mean(-1, keepdims=True)).max(-1) > 0.2).mean() > 0.002  # lines or areas in colour


def test_a_grid_of_heads_is_the_truth(folder: Path) -> None:
    """As many squares as heads that are left, and that are gone."""
    report = PruneReport.read(folder)
    text = (folder / "report.html").read_text()
    drawing = re.search(r'<section id="heads">.*?</section>', text, re.S)
    assert drawing
    for color, number in (
        ("first", sum(layer["num_heads"] for layer in report.layers)),
        ("gone", sum(layer["num_heads_before"] - layer["num_heads"] for layer in report.layers)),
    ):
        how = "fill" if color == "first" else "stroke"
        outlines = re.findall(rf'<path d="([^"]*)"[^>]*style="[^"]*{how}: var\(--{color}\)', drawing[0])
        assert max(outline.count("z") for outline in outlines) == number


@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "best", "ratio": 0.5},
        {"recovery": "none", "criterion": "magnitude", "allocation": "uniform"},
        {"ratio": 1e-6},
    ],
)
def test_any_pruning_has_a_page(token_ids: torch.Tensor, tmp_path: Path, settings: dict[str, Any]) -> None:
    out = pruned_into(tmp_path / "out", token_ids, **settings)
    before = {path.name for path in out.iterdir()}
    assert write_page(out) == out / "report.html"
    assert {path.name for path in out.iterdir()} == before | {"report.html", "report"}
    first = (out / "report.html").read_bytes()
    write_page(out)
    assert (out / "report.html").read_bytes() == first  # and it is the same every time
    page = Parsed(first.decode())
    assert "Sample text" not in page.words and "training" not in [a.get("id") for _, a in page.tags]


def test_text_is_no_markup(token_ids: torch.Tensor, tmp_path: Path) -> None:
    out = pruned_into(tmp_path / "out", token_ids)
    write_page(out, Sample("<script>alert(1)</script> & so", "<b>on</b>", None))
    page = Parsed((out / "report.html").read_text())
    assert "script" not in [tag for tag, _ in page.tags] and "<script>alert(1)</script> & so" in page.words


def test_the_command_and_prune_write_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ["--out", out, "--ratio", "0.3", "--samples", "4", "--seq-len", "32"]
    code, words, _ = call(capsys, "prune", STORIES, *options)
    assert code == 0 and "report.html" in words
    assert "Sample text" in (out / "report.html").read_text()
    assert {path.stem for path in (out / "report").iterdir()} == {p.name for p in PICTURES if p.name != "training"}
    code, words, _ = call(capsys, "prune", STORIES, *options[2:], "--out", tmp_path / "other", "--no-page")
    assert code == 0 and not (tmp_path / "other" / "report.html").exists()
    code, words, _ = call(capsys, "report", tmp_path / "other", "--dense", STORIES, "--prompt", "One day, Tim")
    assert code == 0 and "report.html" in words
    assert "One day, Tim" in (tmp_path / "other" / "report.html").read_text()
    before = (tmp_path / "other" / "report.html").read_bytes()
    shutil.copytree(STORIES, tmp_path / "flatter")
    changed = json.loads((STORIES / "config.json").read_text()) | {"num_hidden_layers": 4}
    (tmp_path / "flatter" / "config.json").write_text(json.dumps(changed))
    tensors = load_file(STORIES / "model.safetensors")
    left = {name: tensor for name, tensor in tensors.items() if "layers.4." not in name}
    save_file(left, tmp_path / "flatter" / "model.safetensors", metadata={"format": "pt"})
    code, _, words = call(capsys, "report", tmp_path / "other", "--dense", tmp_path / "flatter")
    assert code == 2 and "its num_hidden_layers is 4 instead of 5" in words
    assert (tmp_path / "other" / "report.html").read_bytes() == before
    (tmp_path / "other" / "report" / "training.png").touch()  # of an earlier page
    assert call(capsys, "report", tmp_path / "other", "--no-sample")[0] == 0
    assert not (tmp_path / "other" / "report" / "training.png").exists()
    code, _, words = call(capsys, "report", tmp_path)
    assert code == 2 and "There is no" in words and "report.json" in words
    code, _, words = call(capsys, "report", out, "--prompt", " ")
    assert code == 2 and "prompt of the sample is empty" in words
    with pytest.raises(InputError, match=r"caf\\udce9, is not valid Unicode"):  # as bytes of another encoding arrive
        make_sample(STORIES, prompt="caf\udce9")


def test_a_page_that_fails_costs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimllm.report.write.SAMPLED_PARAMETERS", 0)

    def full(*arguments: object, **settings: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    options = ["--ratio", "0.3", "--samples", "4", "--seq-len", "32", "--out", tmp_path / "out"]
    code, _, said = call(capsys, "prune", STORIES, *options)
    assert code == 0 and "No space left" in said and "to try again" in said and (tmp_path / "out" / "report.json").is_file()


def test_reports_of_older_versions(token_ids: torch.Tensor, tmp_path: Path) -> None:
    out = pruned_into(tmp_path / "out", token_ids)
    report = PruneReport.read(out)
    for layer in report.layers:
        for name in ("num_heads", "num_kv_heads", "intermediate_size"):
            del layer[f"{name}_before"]
    report.save(out)
    with pytest.raises(InputError, match="is of an older version"):
        write_page(out)


CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
# The smallest letters of the pictures and of the page, and what is wider than the page.
LOOK = """() => ({
  drawn: Math.min(...[...document.querySelectorAll("svg text")].map(
    (text) => parseFloat(getComputedStyle(text).fontSize) * Math.hypot(text.getScreenCTM().a, text.getScreenCTM().b))),
  written: Math.min(...[...document.querySelectorAll("p, td, th, dd, dt, h2, blockquote, .figures div")].map(
    (text) => parseFloat(getComputedStyle(text).fontSize))),
  width: document.documentElement.scrollWidth,
  pictures: [...document.querySelectorAll("svg")].map(
    (svg) => [svg.getBoundingClientRect().width, svg.getBoundingClientRect().height]),
  ink: getComputedStyle(document.body).color,
  paper: getComputedStyle(document.body).backgroundColor,
  label: getComputedStyle(document.querySelector("svg text")).fill,
})"""


def luminance(color: str) -> float:
    """Relative luminance of `rgb(r, g, b)` (WCAG 2)."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
    r, g, b = (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; make test-page says how to have it")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_in_chromium(folder: Path, tmp_path: Path, width: int, scheme: Any) -> None:
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page = context.new_page()
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((folder / "report.html").as_uri())
        look = page.evaluate(LOOK)
        page.screenshot(path=tmp_path / f"{width}-{scheme}.png", full_page=True)
        browser.close()
    assert said == [] and asked == [(folder / "report.html").as_uri()]
    assert look["width"] == width, "something is wider than the page"
    assert len(look["pictures"]) == len(PICTURES)
    assert all(box[0] > 0.6 * min(width, 600) and box[1] > 80 for box in look["pictures"])
    assert look["drawn"] >= 9.5 and look["written"] >= 13
    assert contrast(look["ink"], look["paper"]) > 10 and contrast(look["label"], look["paper"]) > 10
    assert (luminance(look["paper"]) < 0.1) == (scheme == "dark")
