"""Writing of the page: the report's numbers and pictures are put into the template."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import jinja2
import matplotlib

from slimllm.errors import InputError
from slimllm.finetuning.report import FINETUNE_NAME, FinetuneReport
from slimllm.pruning.report import PruneReport
from slimllm.report.figures import PICTURES, drawn
from slimllm.report.palette import DARK, LIGHT, STYLE, VARIABLE, css, svg
from slimllm.report.sample import REPETITION_PENALTY, Sample, make_sample

PAGE_NAME, PICTURE_FOLDER = "report.html", "report"
SAMPLED_PARAMETERS = 1_000_000_000  # models up to this size get a sample by default


def write_page_of(folder: Path) -> Path:
    """Write the page of a new model, with a sample if the model is small and no memory budget was set."""
    report = PruneReport.read(folder)
    config = report.config
    sampled = report.parameters["after"] <= SAMPLED_PARAMETERS and not (config["host_memory"] or config["gpu_memory"])
    return write_page(folder, make_sample(folder, device=config["device"]) if sampled else None)


def write_page(folder: str | Path, sample: Sample | None = None) -> Path:
    """Write report.html, and its pictures as PNGs into report/, into the folder of a pruned model.

    No other files are replaced.

    Args:
        folder: The folder written by `prune` or `finetune`.
        sample: Generated text for the page.

    Returns:
        The path of the page.

    Raises:
        ValueError: (as InputError) the folder has no report.json of this version, or cannot be written to.
    """
    folder = Path(folder)
    report = PruneReport.read(folder)
    if any("num_heads_before" not in layer for layer in report.layers):
        raise InputError(f"{folder / 'report.json'} is of an older version, without the sizes before pruning; prune again.")
    trained = FinetuneReport.read(folder) if (folder / FINETUNE_NAME).is_file() else None
    pictures = [
        (picture, svg(figure, picture.name, f"{picture.title}. {picture.caption}"))
        for picture, figure in drawn(report, trained, VARIABLE)
    ]
    loader = jinja2.PackageLoader("slimllm.report", ".")
    templates = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = templates.get_template("page.html").render(
        report=report,
        trained=trained,
        pictures=pictures,
        sample=sample,
        light=css(LIGHT),
        dark=css(DARK),
        penalty=REPETITION_PENALTY,
        memory=report.gpu_memory_gib or report.memory_gib,
        name=Path(report.model).name.removesuffix(".gguf"),
    )
    try:
        with tempfile.TemporaryDirectory(prefix=".report-", dir=folder) as beside:
            with matplotlib.rc_context(STYLE):
                for picture, figure in drawn(report, trained, LIGHT):
                    figure.savefig(Path(beside) / f"{picture.name}.png", dpi=160, facecolor="white")
            (folder / PICTURE_FOLDER).mkdir(exist_ok=True)
            for picture in PICTURES:
                made, place = Path(beside) / f"{picture.name}.png", folder / PICTURE_FOLDER / f"{picture.name}.png"
                if made.exists():
                    os.replace(made, place)
                else:
                    place.unlink(missing_ok=True)  # of an earlier page
            written = Path(beside) / PAGE_NAME
            written.write_text(text, encoding="utf-8", errors="backslashreplace")
            os.replace(written, folder / PAGE_NAME)
    except OSError as error:
        raise InputError(f"The page cannot be written to {folder}: {error.strerror}.") from None
    return folder / PAGE_NAME
