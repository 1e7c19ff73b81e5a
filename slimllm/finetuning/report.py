"""finetune.json: the report of a training, for people and programs."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimllm.checkpoints.foreign_json import EVERY
from slimllm.errors import InputError
from slimllm.pruning.model_card import in_line
from slimllm.pruning.report import REPORT_NAME, read_report

FINETUNE_NAME = "finetune.json"


_SHAPE = {
    "model": str,
    "data": str,
    "out": str,
    "config": {"rank": int, "learning_rate": float, "batch_size": int},
    "examples": int,
    "held_out_examples": int,
    "trainable": int,
    "parameters": int,
    "loss": [float],
    "held_out": [[float]],
    "tokens": int,
    "elapsed_s": float,
    "peak_host_gib": float,
    "peak_gpu_gib": float,
    "device": str,
    "compute_dtype": str,
    "versions": {EVERY: str},
    "identity": dict,
    "teacher?": str,
}


@dataclass
class FinetuneReport:
    """Record of a training. The keys of finetune.json are the names of these fields.

    Attributes:
        model, data, out: The arguments, as given by the user.
        config: The settings (`FinetuneConfig.to_dict`).
        examples, held_out_examples: Numbers of examples trained on, and only measured.
        trainable, parameters: Numbers of parameters that were trained, and of the model.
        loss: Loss before every step, in nats per learnt token.
        held_out: Pairs of a number of steps done and the mean loss of the held-out examples after them: for 0 steps, every
            `save_every` steps, and at the end. The losses are measured before the weights are rounded to the checkpoint's
            dtype.
        tokens: Number of tokens that passed the model in training.
        elapsed_s: Total seconds, including those before an interruption.
        peak_host_gib, peak_gpu_gib: Peak memory since the last interruption.
        device, compute_dtype, versions: Device, dtype and software versions of the computation.
        identity: Everything that two trainings must have in common for one to resume the other.
        teacher: The model whose distributions were learnt, as given by the user; empty: none. Losses are then the
            divergence from it, in nats a token, and the labels' loss by its share.
    """

    model: str
    data: str
    out: str
    config: dict[str, Any]
    examples: int
    held_out_examples: int
    trainable: int
    parameters: int
    loss: list[float]
    held_out: list[tuple[int, float]]
    tokens: int
    elapsed_s: float
    peak_host_gib: float
    peak_gpu_gib: float
    device: str
    compute_dtype: str
    versions: dict[str, str]
    identity: dict[str, Any]
    teacher: str = ""

    def save(self, folder: Path) -> None:
        """Write finetune.json into the folder."""
        text = json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False)
        (folder / FINETUNE_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> FinetuneReport:
        """Read the report of a trained checkpoint.

        Raises:
            ValueError: (as InputError) the folder has no finetune.json, or the file is not a report of a training.
        """
        path = Path(folder) / FINETUNE_NAME
        report = read_report(cls, path, "a training", _SHAPE)
        if any(len(pair) != 2 for pair in report.held_out):
            raise InputError(f"{path} is not the report of a training: held_out is not a list of pairs.")
        return report


def add_to_model_card(report: FinetuneReport, folder: Path) -> None:
    """Describe the training in the README.md of a folder, if there is one; the text does not depend on the clock."""
    card, config = folder / "README.md", report.config
    if not card.is_file():
        return
    held_out = f" It learnt the distributions of {in_line(Path(report.teacher).name)}." if report.teacher else ""
    if report.held_out:
        held_out += f" The loss on {report.held_out_examples} held-out examples went from {report.held_out[0][1]:.3f} to "
        held_out += f"{report.held_out[-1][1]:.3f} nats a token."
    pruned = " Perplexities above are those before." if (folder / REPORT_NAME).is_file() else ""
    what = {
        "lora": f"LoRA (rank {config['rank']}), merged into the weights",
        "output": "training the layers' output projections, norms and biases",
        "all": "training all weights of the layers",
    }[config.get("train", "lora")]
    text = f"""
## Trained

By {what}, with learning rate {config["learning_rate"]:g} and batches of
{config["batch_size"]}, on {in_line(Path(report.data).name)}: {len(report.loss)} steps over {report.examples}
examples.{held_out}{pruned} Every step is in `finetune.json`.
"""
    text = card.read_text(encoding="utf-8").rstrip() + "\n" + text
    card.write_text(text, encoding="utf-8", errors="backslashreplace")  # a path may hold bytes that are not UTF-8
