"""LoRA on a pruned model: what is learnt, what is written, and that an interrupted training becomes what it would be."""

from __future__ import annotations

import copy
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call
from conftest import STORIES, config, contents, stop_at
from safetensors.torch import load_file
from tiny_models import PECULIAR, tiny
from torch import nn
from transformers import AutoModelForCausalLM

from slimllm import InputError, load, perplexity, prune
from slimllm.calibration import bundled_text, tokenize
from slimllm.checkpoints.opening import open_checkpoint
from slimllm.finetuning import FinetuneConfig, FinetuneReport, finetune
from slimllm.finetuning.data import Example, read_examples
from slimllm.finetuning.train import Training
from slimllm.models.families import family_of

QUICK: dict[str, Any] = {"seq_len": 32, "max_steps": 6, "save_every": 2, "learning_rate": 1e-3, "held_out": 8}


@pytest.fixture(scope="module")
def whole(pruned: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    finetune(pruned, text, out, FinetuneConfig(**QUICK))
    return out


def files(folder: Path) -> dict[str, bytes]:
    """All but the report of the training, which has times in it."""
    return {name: content for name, content in contents(folder).items() if name != "finetune.json"}


def test_the_loss_falls(pruned: Path, tmp_path: Path) -> None:
    """On text that is not trained on, too; and the written model is what was trained."""
    tokens = tokenize(open_checkpoint(STORIES).tokenizer(), [bundled_text("evaluation")[:20_000]])
    data = tmp_path / "data.txt"
    data.write_text(bundled_text("calibration")[:150_000])
    settings = FinetuneConfig(seq_len=64, learning_rate=3e-3, epochs=1, held_out=32)
    report = finetune(pruned, data, tmp_path / "out", settings)
    before, after = (perplexity(load(folder)[0], tokens, seq_len=64) for folder in (pruned, tmp_path / "out"))
    assert after < 0.9 * before
    (first, dense), (last, trained) = report.held_out[0], report.held_out[-1]
    assert (first, last) == (0, len(report.loss)) and trained < dense - 0.1
    examples = read_examples(data, load(pruned)[1], 64)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    windows = torch.tensor([examples[index].ids for index in order[-32:]])
    assert math.log(perplexity(load(tmp_path / "out")[0], windows.flatten(), seq_len=64)) == pytest.approx(
        trained, abs=1e-4
    )


def test_the_result_is_as_before_but_for_the_weights(pruned: Path, whole: Path) -> None:
    before, after = files(pruned), files(whole)
    assert before.keys() == after.keys()
    assert (whole / "report.json").read_bytes() == (pruned / "report.json").read_bytes()
    for name in before:
        if not name.endswith((".safetensors", "README.md", ".index.json")):
            assert before[name] == after[name], name
    assert "By LoRA (rank 4" in (whole / "README.md").read_text()
    changed = {}
    for shard in sorted(pruned.glob("*.safetensors")):
        old, new = load_file(shard), load_file(whole / shard.name)
        assert old.keys() == new.keys()
        changed |= {name: not torch.equal(old[name], new[name]) for name in old}
    assert {name for name, other in changed.items() if other} == {
        name for name in changed if ".layers." in name and name.endswith("_proj.weight")
    }
    # In a process that knows nothing of this package.
    code = (
        "import sys; from transformers import AutoModelForCausalLM as M; "
        f"m = M.from_pretrained({str(whole)!r}, trust_remote_code=True); assert 'slimllm' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=whole.parent)
    assert done.returncode == 0, done.stderr


def test_the_report(whole: Path, pruned: Path, text: Path) -> None:
    report = FinetuneReport.read(whole)
    assert len(report.loss) == 6 and [step for step, _ in report.held_out] == [0, 2, 4, 6]
    assert report.tokens == 6 * 16 * 32 and report.held_out_examples == 8
    assert report.config == FinetuneConfig(**QUICK).to_dict()
    model = AutoModelForCausalLM.from_pretrained(pruned)
    linears = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    assert report.trainable == sum(4 * (one.in_features + one.out_features) for one in linears)
    with pytest.raises(InputError, match=r"There is no .*finetune\.json"):
        FinetuneReport.read(pruned)


@pytest.mark.parametrize("step", [0, 1, 3, 5])
def test_interrupted_and_gone_on_with(
    pruned: Path, text: Path, whole: Path, tmp_path: Path, step: int, told: list[str]
) -> None:
    settings = FinetuneConfig(**QUICK)
    with pytest.raises(KeyboardInterrupt):
        finetune(pruned, text, tmp_path / "out", settings, progress=stop_at("train", step))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="add --resume"):
        finetune(pruned, text, tmp_path / "out", settings)
    with pytest.raises(InputError, match="had another learning_rate"):
        finetune(pruned, text, tmp_path / "out", FinetuneConfig(**{**QUICK, "learning_rate": 1e-4}), resume=True)
    report = finetune(pruned, text, tmp_path / "out", settings, resume=True)
    assert told == [f"Resuming after step {step + 1} of 6."]
    assert files(tmp_path / "out") == files(whole)
    expected = FinetuneReport.read(whole)
    assert (report.loss, [list(one) for one in report.held_out]) == (expected.loss, expected.held_out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_micro_batches_change_rounding_only(pruned: Path, text: Path, whole: Path, tmp_path: Path) -> None:
    settings = FinetuneConfig(**QUICK, micro_batch=5, dropout=0.0)
    other = FinetuneConfig(**QUICK, micro_batch=16, dropout=0.0)
    one, two = (finetune(pruned, text, tmp_path / str(n), each) for n, each in enumerate((settings, other)))
    assert one.loss == pytest.approx(two.loss, rel=1e-5) and one.loss != FinetuneReport.read(whole).loss


def test_a_step_by_hand(pruned: Path, text: Path) -> None:
    """The first step of AdamW moves every factor whose gradient is not 0 by the learning rate, against its sign."""
    model, tokenizer = load(pruned)
    examples = read_examples(text, tokenizer, 32)[:16]
    training = Training(model, "model.layers", examples, FinetuneConfig(seq_len=32, dropout=0.0))
    dense = load(pruned, device="cpu")[0]
    ids = torch.tensor([example.ids for example in examples])
    with torch.no_grad():
        logits = dense(ids).logits.double()
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    before = {name: factor.detach().clone() for name, factor in training.model.named_parameters() if factor.requires_grad}
    loss, tokens = training.step()
    assert loss == pytest.approx(float(expected), rel=1e-5) and tokens == 16 * 32
    assert training.num_steps == 2 and training.learning_rate(0) == 1e-4 and training.learning_rate(1) == 5e-5
    for name, factor in training.model.named_parameters():
        if factor.requires_grad:
            moved = (factor.detach() - before[name]).abs()
            if "lora_B" in name:
                assert bool((factor.grad.sign() == (before[name] - factor.detach()).sign()).all())
                assert moved.max() == pytest.approx(1e-4, rel=1e-2), name
            else:  # B is 0 at first, so that A has no gradient
                assert float(moved.max()) == 0, name


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_memory_runs_out(where: str, pruned: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausting(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    owner, name = (nn.functional, "nll_loss") if where == "forward" else (torch.Tensor, "backward")
    monkeypatch.setattr(owner, name, exhausting)
    for size, advice in ((4, "micro_batch"), (1, "seq_len")):
        with pytest.raises(ValueError, match=f"GPU memory is not enough for {size} .* give a smaller {advice}"):
            finetune(pruned, text, tmp_path / "out", FinetuneConfig(**QUICK, micro_batch=size))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("train", ["lora", "output"])
@pytest.mark.parametrize("family", sorted(PECULIAR))
def test_every_family_trains(family: str, train: str) -> None:
    """A model's own dropout stays off, and what is written computes what was trained."""
    own = {"dropout": 0.3, "attention_dropout": 0.3} if family == "opt" else {}
    model = tiny(family, **own)
    dense, spec = copy.deepcopy(model), family_of(model.config.model_type)
    ids = torch.randint(3, 96, (8, 24), generator=torch.Generator().manual_seed(0))
    examples = [Example(tuple(row.tolist()), given=number) for number, row in enumerate(ids)]
    settings = FinetuneConfig(batch_size=8, epochs=6, dropout=0.0, learning_rate=1e-2, micro_batch=3, train=train)
    training = Training(model, spec.layers, examples, settings, outputs=(spec.o_proj, spec.down_proj))
    before = training.mean_loss(examples)
    state = torch.random.get_rng_state()
    assert training.step()[0] == pytest.approx(before, rel=1e-5)
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's draws are not touched
    while training.done < training.num_steps:
        training.step()
    after = training.mean_loss(examples)
    assert after < before - 0.05
    with torch.no_grad():
        for name in training.tensors:
            dense.get_parameter(name).copy_(training.value(name, dense.get_parameter(name)))
        scores = dense(ids).logits.double().log_softmax(-1)
    found = [
        -float(scores[row, position - 1, ids[row, position]]) for row in range(8) for position in range(max(1, row), 24)
    ]
    assert sum(found) / len(found) == pytest.approx(after, rel=1e-4)


def test_a_loss_that_is_not_finite(pruned: Path, text: Path, tmp_path: Path) -> None:
    """Going on would fail again, so that nothing is left to go on with."""
    settings = FinetuneConfig(**{**QUICK, "learning_rate": 1e30, "held_out": 0, "max_steps": 20})
    with pytest.raises(InputError, match="give a smaller learning_rate"):
        finetune(pruned, text, tmp_path / "out", settings)
    assert list(tmp_path.iterdir()) == []


def test_complete_already(pruned: Path, text: Path, whole: Path, told: list[str]) -> None:
    before = contents(whole)
    report = finetune(pruned, text, whole, FinetuneConfig(**QUICK), resume=True)
    assert told == [f"{whole} is complete already."] and contents(whole) == before and len(report.loss) == 6
    with pytest.raises(InputError, match="is not empty"):
        finetune(pruned, text, whole, FinetuneConfig(**{**QUICK, "seed": 1}), resume=True)
    assert contents(whole) == before


def test_replaced_when_asked(pruned: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(pruned, tmp_path / "out")
    with pytest.raises(InputError, match="is not empty"):
        finetune(pruned, text, tmp_path / "out", FinetuneConfig(**QUICK))
    assert contents(tmp_path / "out") == contents(pruned)
    finetune(pruned, text, tmp_path / "out", FinetuneConfig(**QUICK), overwrite=True)
    assert (tmp_path / "out" / "finetune.json").is_file()


def test_in_bfloat16(text: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    """Computed and stored in half precision; the factors are not, and what is merged is rounded once."""
    prune(STORIES, tmp_path / "half", config(token_ids, ratio=0.5, dtype="bfloat16"))
    settings = FinetuneConfig(**{**QUICK, "learning_rate": 1e-2}, dtype="bfloat16")
    report = finetune(tmp_path / "half", text, tmp_path / "out", settings)
    assert report.compute_dtype == "bfloat16" and report.held_out[-1][1] < report.held_out[0][1] - 0.05
    tensors = load_file(sorted((tmp_path / "out").glob("*.safetensors"))[0])
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_command(pruned: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", text, "--out", tmp_path / "out", "--seq-len", "32", "--max-steps", "2", "--lr", "0.001"]
    code, words, _ = call(capsys, "finetune", pruned, *options)
    assert code == 0 and "2 steps over" in words and "held-out examples" in words and "report.html" in words
    assert "Training after pruning" in (tmp_path / "out" / "report.html").read_text()
    code, _, words = call(capsys, "finetune", pruned, *options)
    assert code == 2 and "is not empty" in words
    code, _, words = call(capsys, "finetune", pruned, *options, "--dtype", "float16")
    assert code == 2 and "dtype must be one of float32, bfloat16" in words


def test_learning_rate() -> None:
    model, tokenizer = load(STORIES)
    example = read_examples_of(tokenizer, "Once upon a time there was a little girl and a dog in the park", 8)[0]
    training = Training(model, "model.layers", [example] * 16, FinetuneConfig(seq_len=8, epochs=40, warmup=0.1))
    rates = [training.learning_rate(step) / 1e-4 for step in range(40)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0]) and max(rates) == 1.0
    assert rates[4] == pytest.approx(36 / 37) and rates[-1] == pytest.approx(1 / 37)


def read_examples_of(tokenizer: Any, text: str, seq_len: int) -> list[Any]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        path.write_text(text)
        return read_examples(path, tokenizer, seq_len)


def test_trains_on_instructions(pruned: Path, tmp_path: Path) -> None:
    path = tmp_path / "alpaca.jsonl"
    animals = [f"the {name}" for name in ("dog", "cat", "bird", "fish", "frog", "bear", "fox", "cow")] * 4
    path.write_text("\n".join(json.dumps({"instruction": "Name one.", "output": one}) for one in animals))
    settings = FinetuneConfig(seq_len=200, max_steps=4, learning_rate=1e-2, held_out=3)
    report = finetune(pruned, path, tmp_path / "out", settings)
    assert report.examples == 29 and report.held_out_examples == 3 and report.loss[-1] < 0.8 * report.loss[0]


def test_what_cannot_be(pruned: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no file"):
        finetune(pruned, tmp_path / "no.txt", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="seq_len is 1024, but the model takes at most 512"):
        finetune(pruned, text, tmp_path / "out", FinetuneConfig(seq_len=1024))
    with pytest.raises(InputError, match="is, contains or lies in"):
        finetune(pruned, text, pruned, FinetuneConfig(**QUICK), overwrite=True)
    with pytest.raises(TypeError, match="config must be a FinetuneConfig"):
        finetune(pruned, text, tmp_path / "out", {})  # type: ignore[arg-type]
    for name, value in {"rank": 0, "dropout": 1.0, "learning_rate": 0.0, "seq_len": 1, "dtype": "float16"}.items():
        with pytest.raises(InputError, match=name):
            FinetuneConfig(**{name: value})
    with pytest.raises(TypeError, match="epochs must be an integer"):
        FinetuneConfig(epochs=1.5)  # type: ignore[arg-type]
