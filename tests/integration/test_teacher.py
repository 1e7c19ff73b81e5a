"""LoRA with a teacher: the divergence from the dense model is what is learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call
from conftest import STORIES, contents, stop_at
from tiny_models import tiny

from slimllm import InputError, load
from slimllm.finetuning import FinetuneConfig, FinetuneReport, finetune
from slimllm.finetuning.data import read_examples
from slimllm.finetuning.train import Training

QUICK: dict[str, Any] = {"seq_len": 32, "max_steps": 6, "save_every": 2, "learning_rate": 3e-3, "held_out": 8}


@pytest.mark.parametrize("labels", [0.0, 0.25, 1.0])
def test_the_loss_by_hand(pruned: Path, text: Path, labels: float) -> None:
    (model, tokenizer), teacher = load(pruned), load(STORIES)[0]
    examples = read_examples(text, tokenizer, 32)[:6]
    ids = torch.tensor([example.ids for example in examples])
    with torch.no_grad():
        p, q = (torch.log_softmax(one(ids).logits[:, :-1].double(), -1) for one in (teacher, model))
    divergence = float((p.exp() * (p - q)).sum(-1).mean())
    of_labels = -float(q.gather(-1, ids[:, 1:, None]).mean())
    settings = FinetuneConfig(seq_len=32, dropout=0.0, labels=labels)
    found = Training(model, "model.layers", examples, settings, teacher).mean_loss(examples)
    assert found == pytest.approx((1 - labels) * divergence + labels * of_labels, rel=1e-4)
    assert divergence > 0.1


def test_the_divergence_falls_and_a_resumed_training_is_the_same(pruned: Path, text: Path, tmp_path: Path) -> None:
    settings = FinetuneConfig(**QUICK)
    report = finetune(pruned, text, tmp_path / "whole", settings, teacher=STORIES)
    assert report.held_out[-1][1] < 0.97 * report.held_out[0][1]
    assert report.teacher == str(STORIES) and FinetuneReport.read(tmp_path / "whole").teacher == str(STORIES)
    assert f"learnt the distributions of {STORIES.name}" in (tmp_path / "whole" / "README.md").read_text()
    with pytest.raises(KeyboardInterrupt):
        finetune(pruned, text, tmp_path / "out", settings, teacher=STORIES, progress=stop_at("train", 3))
    with pytest.raises(InputError, match="had another teacher"):
        finetune(pruned, text, tmp_path / "out", settings, teacher=pruned, resume=True)
    with pytest.raises(InputError, match="teacher"):
        finetune(pruned, text, tmp_path / "out", settings, resume=True)
    finetune(pruned, text, tmp_path / "out", settings, teacher=STORIES, resume=True)
    one, two = (contents(tmp_path / name) for name in ("whole", "out"))
    assert {name: one[name] for name in one if name != "finetune.json"} == {
        name: two[name] for name in two if name != "finetune.json"
    }


def test_a_model_has_nothing_to_learn_from_itself(text: Path) -> None:
    model, tokenizer = load(STORIES)
    examples = read_examples(text, tokenizer, 32)[:4]
    training = Training(model, "model.layers", examples, FinetuneConfig(seq_len=32, dropout=0.0), load(STORIES)[0])
    assert abs(training.mean_loss(examples)) < 1e-6


def test_teachers_that_are_refused(pruned: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"labels is 0.5, the labels' share beside a teacher"):
        finetune(pruned, text, tmp_path / "out", FinetuneConfig(**QUICK, labels=0.5))
    with pytest.raises(InputError, match="labels is a share and must be at most 1, got 2"):
        FinetuneConfig(labels=2.0)
    other = tiny("llama", vocab_size=300)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"The teacher .* has 300 tokens and the model 512; give the model that was"):
        finetune(pruned, text, tmp_path / "out", FinetuneConfig(**QUICK), teacher=tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_on_the_command_line(pruned: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--seq-len", "32", "--max-steps", "2", "--teacher", str(STORIES)]
    code, out, err = call(capsys, "finetune", str(pruned), "--data", str(text), "--out", str(tmp_path / "out"), *options)
    assert code == 0 and "Divergence from the teacher on" in " ".join(out.split()), err
    code, _, err = call(
        capsys,
        "finetune",
        str(pruned),
        "--data",
        str(text),
        "--out",
        str(tmp_path / "b"),
        "--teacher",
        str(tmp_path / "no"),
    )
    assert code == 2 and "no" in err and not (tmp_path / "b").exists()
