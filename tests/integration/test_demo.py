from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from slimllm import PruneReport
from slimllm.cli import demo_display as demo


def test_demo_with_the_bundled_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What happens where the package with the larger model cannot be had."""
    monkeypatch.setattr(demo, "find_demo_model", lambda: None)
    console = Console(width=400, record=True)
    demo.run_demo(tmp_path / "out", 0.2, False, console)
    text = console.export_text()
    assert "is not installed" in text and "is used instead" in text
    for line in (
        "parameters",
        "perplexity",
        "weights at 32 bits",
        "prefill",
        "generation",
        "pruned in",
        "dense",
        "best",
        "Next, with a model and a text of your own",
    ):
        assert line in text
    assert PruneReport.read(tmp_path / "out").achieved_ratio == pytest.approx(0.2, rel=0.005)
    assert f"page    {tmp_path / 'out' / 'report.html'}" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").is_file() and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.skipif(demo.find_demo_model() is None, reason="the package with SmolLM2 is not installed (make demo does it)")
def test_demo_with_the_real_model(tmp_path: Path) -> None:
    console = Console(width=400, record=True)
    demo.run_demo(tmp_path / "out", 0.2, False, console)
    report = PruneReport.read(tmp_path / "out")
    assert report.parameters["before"] == 134_515_008
    assert report.peak_host_gib <= sum(report.memory_gib.values()) * 1.1
