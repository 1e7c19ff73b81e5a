"""Zero-shot and few-shot accuracy on multiple-choice tasks, through lm-eval. Called by `slimllm eval --tasks`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimllm.errors import InputError

# The paper's seven tasks, in the order of its tables.
PAPER_TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


def task_manager(tasks: Sequence[str], include_path: Path | None = None) -> Any:
    """Return lm-eval's catalogue of tasks after checking that it has all of `tasks`.

    Raises:
        ValueError: (as InputError) lm-eval is not installed, or does not know a task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise InputError(
            "Tasks are run by lm-eval, which is not installed; run pip install lm-eval, or install this package with the "
            "extra eval."
        ) from None
    if include_path is not None and not include_path.is_dir():
        raise InputError(f"The folder {include_path} with task descriptions does not exist.")
    manager = TaskManager(include_path=str(include_path) if include_path else None)
    for task in tasks:
        if task not in manager.all_tasks:
            raise InputError(f"lm-eval has no task {task!r}; `lm-eval ls tasks` lists its tasks.")
    return manager


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] = PAPER_TASKS,
    *,
    few_shot: int = 0,
    limit: int | None = None,
    include_path: Path | None = None,
    batch_size: int = 8,
) -> dict[str, float]:
    """Measure the accuracy of a model on tasks; it is normalised by answer length if lm-eval has that, as in the paper.

    Args:
        model, tokenizer: As returned by `slimllm.load`.
        tasks: Names in lm-eval. Their data come from the hub, or from the cache of `datasets` if that is set to offline
            (HF_DATASETS_OFFLINE=1).
        few_shot: Number of solved examples before each question.
        limit: Number of questions of each task; None: all.
        include_path: A folder with lm-eval descriptions of further tasks, or of the same tasks on your own data.
        batch_size: Answers in a forward pass.

    Returns:
        Accuracy from 0 to 1, by task.

    Raises:
        ValueError: (as InputError) lm-eval is not installed or does not know a task, its data cannot be loaded, or a task
            has no accuracy.
    """
    for name, value, least in (("few_shot", few_shot, 0), ("limit", limit, 1), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise InputError(f"{name} must be at least {least}, got {value}.")
    manager = task_manager(tasks, include_path)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
    try:
        found = lm_eval.simple_evaluate(
            wrapped,
            tasks=list(tasks),
            num_fewshot=few_shot,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=False,
        )
    except (OSError, ValueError) as error:
        raise InputError(f"lm-eval could not run {', '.join(tasks)}: {str(error).splitlines()[0]}") from error
    assert found is not None
    return {task: _accuracy(task, found["results"][task]) for task in tasks}


def _accuracy(task: str, metrics: dict[str, Any]) -> float:
    for metric in ("acc_norm,none", "acc,none"):
        if metric in metrics:
            return float(metrics[metric])
    raise InputError(f"The task {task} has no accuracy; it measures {', '.join(metrics)}.")
