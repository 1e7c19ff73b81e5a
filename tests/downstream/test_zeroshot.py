"""Tasks of lm-eval on a few rows of each that are here, beside lm-eval called by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import call
from conftest import config
from transformers import AutoModelForCausalLM, AutoTokenizer

import slimllm
from slimllm import InputError
from slimllm.evaluation.tasks import PAPER_TASKS, zero_shot
from slimllm.experiments.bench.synthetic import as_mha

lm_eval: Any = pytest.importorskip("lm_eval", reason="lm-eval is not installed; make install does that")
ROWS = Path(__file__).parents[1] / "data" / "zeroshot"
OWN = Path(lm_eval.__file__).parent / "tasks"
FILES = {
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "mathqa": "mathqa/mathqa.yaml",
    "rte": "glue/rte/default.yaml",
}
EVERY = (*PAPER_TASKS, "mathqa", "rte")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """lm-eval's own descriptions, on the rows that are here."""
    folder = tmp_path_factory.mktemp("tasks")
    for task in EVERY:
        splits = ("training_split", "validation_split", "test_split", "fewshot_split")
        description: dict[str, Any] = {
            "include": str(OWN / FILES[task]),
            "task": task,
            "dataset_path": "json",
            "dataset_name": None,
            **dict.fromkeys(splits, "train"),
            "dataset_kwargs": {"data_files": str(ROWS / f"{task}.jsonl")},
        }
        if task == "hellaswag":
            description["process_docs"] = None  # these rows have been through it
        if task == "boolq":
            description["doc_to_target"] = "{{answer | int}}"
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(description))
    return folder


def by_hand(folder: Path, tasks: Path, few_shot: int) -> dict[str, dict[str, float]]:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    wrapped = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder, trust_remote_code=True), batch_size=1)
    manager = TaskManager(include_path=str(tasks))
    found = lm_eval.simple_evaluate(
        wrapped, tasks=list(EVERY), num_fewshot=few_shot, task_manager=manager, bootstrap_iters=0
    )
    result: dict[str, dict[str, float]] = found["results"]
    return result


@pytest.mark.parametrize(("few_shot", "grouped"), [(0, True), (0, False), (2, True)])
@pytest.mark.slow
def test_as_lm_eval_by_hand(
    stories_path: Path, token_ids: torch.Tensor, tasks: Path, tmp_path: Path, few_shot: int, grouped: bool
) -> None:
    dense = stories_path
    if not grouped:  # the same function, every head with keys and values of its own
        model, tokenizer = slimllm.load(stories_path)
        dense = tmp_path / "mha"
        as_mha(model).save_pretrained(dense)
        tokenizer.save_pretrained(dense)
    slimllm.prune(dense, tmp_path / "out", config(token_ids, ratio=0.3))
    model, tokenizer = slimllm.load(tmp_path / "out")
    assert (model.config.num_attention_heads == model.config.num_key_value_heads) != grouped
    found = zero_shot(model, tokenizer, EVERY, include_path=tasks, few_shot=few_shot)
    wanted = by_hand(tmp_path / "out", tasks, few_shot)
    assert list(found) == list(EVERY)
    for task, value in found.items():
        assert value == wanted[task].get("acc_norm,none", wanted[task]["acc,none"])
    assert len(set(found.values())) > 2  # of 12 questions each


@pytest.mark.slow
def test_from_the_command_line(
    stories_path: Path, token_ids: torch.Tensor, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slimllm.prune(stories_path, tmp_path / "out", config(token_ids, ratio=0.5))
    arguments = ["eval", str(stories_path), str(tmp_path / "out"), "--tasks", "paper", "--limit", "2", "--max-windows", "2"]
    arguments += ["--include-path", str(tasks), "--out", str(tmp_path / "found.json")]
    assert call(capsys, *arguments)[0] == 0
    dense, pruned = json.loads((tmp_path / "found.json").read_text())["models"]
    assert list(dense["accuracy"]) == list(PAPER_TASKS) and dense["retention"] == 100
    mean = sum(pruned["accuracy"].values()) / 7
    assert pruned["mean_accuracy"] == pytest.approx(mean)
    assert pruned["retention"] == pytest.approx(100 * mean / dense["mean_accuracy"])
    model, tokenizer = slimllm.load(tmp_path / "out")
    assert pruned["accuracy"] == zero_shot(model, tokenizer, include_path=tasks, limit=2)
    code, _, error = call(capsys, "eval", str(stories_path), "--tasks", "piqqa")
    assert code == 2 and "has no task 'piqqa'" in error


def test_bad_input(stories_path: Path, tasks: Path) -> None:
    model, tokenizer = slimllm.load(stories_path)
    for settings, sentence in (
        ({"tasks": ["piqqa"]}, "has no task 'piqqa'"),
        ({"few_shot": -1}, "few_shot must be at least 0"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"include_path": tasks / "nowhere"}, r"The folder .* does not exist"),
    ):
        with pytest.raises(InputError, match=sentence):
            zero_shot(model, tokenizer, **{"include_path": tasks, **settings})  # type: ignore[arg-type]
