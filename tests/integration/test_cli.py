"""The command line as users meet it: results, sentences instead of tracebacks, exit codes, untouched folders."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import call
from safetensors.torch import load_file, save_file

import slimllm
from slimllm.calibration import bundled_text, tokenize
from slimllm.evaluation.repetition import repetition
from slimllm.ops.dispatch import triton_is_missing


def run(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "slimllm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)


def test_prune_and_eval(stories_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run("prune", stories_path, "--out", "out", "--ratio", "0.2", "--samples", "8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "x one dense pass" in done.stdout and "bundled text" in done.stdout and "the estimate was" in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["achieved_ratio"] == pytest.approx(0.2, rel=0.005)
    assert "slimllm prune" in (tmp_path / "out" / "README.md").read_text()
    values = []
    for batch_size in ("1", "8"):
        code, out, err = call(capsys, "eval", tmp_path / "out", "--max-windows", "20", "--batch-size", batch_size)
        assert code == 0, err
        match = re.search(r"perplexity ([\d.]+)", out)
        assert match
        values.append(float(match[1]))
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_quiet(stories_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", tmp_path / "out", "--ratio", "0.2", "--samples", "4", "--quiet"]
    assert call(capsys, "prune", stories_path, *arguments) == (0, "", "")


def test_cli_and_python_write_the_same(stories_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import slimllm

    call(
        capsys, "prune", stories_path, "--out", tmp_path / "cli", "--ratio", "0.3", "--samples", "4", "--head-unit", "query"
    )
    slimllm.prune(stories_path, tmp_path / "py", slimllm.PruneConfig(ratio=0.3, samples=4, head_unit="query"))
    for shard in (tmp_path / "cli").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "py" / shard.name).read_bytes()


def broken(stories_path: Path, folder: Path, **config: object) -> Path:
    """A copy of the model, with changes of its configuration."""
    shutil.copytree(stories_path, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def with_tensor(folder: Path, name: str, change: str) -> Path:
    """Damage one tensor."""
    tensors = load_file(folder / "model.safetensors")
    if change == "missing":
        del tensors[name]
    elif change == "shape":
        tensors[name] = tensors[name][:-1].contiguous()
    else:
        tensors[name].view(-1)[5] = float(change)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


Q_PROJ = "model.layers.3.self_attn.q_proj.weight"


def bad_inputs(stories: Path, tmp: Path) -> list[tuple[str, list[str | Path], str]]:
    text = tmp / "short.txt"
    text.write_text("Once upon a time.")
    truncated = broken(stories, tmp / "truncated")
    shard = truncated / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    unsharded = broken(stories, tmp / "no-shard")
    (unsharded / "model.safetensors").unlink()
    pickled = broken(stories, tmp / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    empty = tmp / "empty-folder"
    empty.mkdir()
    jsonl = tmp / "bad.jsonl"
    jsonl.write_text('{"text": "a"}\n{"words": "b"}\n')
    (tmp / "notes.md").write_text("x")
    return [
        ("no such folder", [tmp / "nowhere"], "There is no folder or file"),
        ("no config", [empty], "holds no config.json"),
        ("a file that is no GGUF", [tmp / "notes.md"], "neither a folder nor a GGUF file"),
        (
            "no causal LM",
            [broken(stories, tmp / "cls", architectures=["LlamaForSequenceClassification"])],
            "not a causal language",
        ),
        ("unknown family", [broken(stories, tmp / "gpt2", model_type="gpt2")], "supported types are apertus"),
        ("quantised", [broken(stories, tmp / "q", quantization_config={"quant_method": "gptq"})], "gptq weights"),
        ("no weights", [unsharded], "holds no weights"),
        ("pickled", [pickled], "never read"),
        ("truncated shard", [truncated], "damaged or truncated"),
        ("missing tensor", [with_tensor(broken(stories, tmp / "m"), Q_PROJ, "missing")], f"{Q_PROJ} is missing"),
        ("wrong shape", [with_tensor(broken(stories, tmp / "s"), Q_PROJ, "shape")], r"has shape \(63, 64\)"),
        ("NaN", [with_tensor(broken(stories, tmp / "nan"), Q_PROJ, "nan")], f"{Q_PROJ} .*NaN or infinite"),
        ("Inf", [with_tensor(broken(stories, tmp / "inf"), Q_PROJ, "inf")], f"{Q_PROJ} .*NaN or infinite"),
        ("ratio 0", [stories, "--ratio", "0"], "between 0 and 1, got 0"),
        ("ratio 1", [stories, "--ratio", "1.0"], "between 0 and 1"),
        ("ratio too high", [stories, "--ratio", "0.97"], "more than this model can give"),
        ("short text", [stories, "--calibration", text], "give more text"),
        ("no such text", [stories, "--calibration", tmp / "none.txt"], "does not exist"),
        ("bad jsonl", [stories, "--calibration", jsonl], "Line 2 of"),
        ("no such dataset", [stories, "--calibration", "nobody/nothing"], "no dataset of that name"),
        ("windows too long", [stories, "--seq-len", "1024"], "at most 512"),
        ("preset", [stories, "--preset", "quick"], "preset must be one of best, slimllm, paper, got 'quick'"),
        ("n", [stories, "--preset", "slimllm", "--layer-importance.pruned-layers", "9"], "has 5 layers"),
        ("rounding", [stories, "--round-to", "1000"], "only 172 channels wide"),
        ("an address", [stories, "--calibration", "https://example.com/x.txt"], "https://example.com/x.txt is an address"),
        ("no such file", [stories, "--calibration", "a.csv"], "a.csv does not exist"),
        ("device", [stories, "--device", "tpu9"], "device"),
        ("samples", [stories, "--samples", "0"], "samples must be at least 1"),
    ]


def test_bad_input_is_a_sentence(stories_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    for title, arguments, sentence in bad_inputs(stories_path, tmp_path):
        ratio = [] if "--ratio" in arguments else ["--ratio", "0.2"]
        code, _, err = call(capsys, "prune", *arguments, "--out", out, *ratio)
        assert code == 2, title
        assert re.search(sentence, err), (title, err)
        assert "Traceback" not in err and err.startswith("Error: "), (title, err)
        assert not out.exists() and not list(tmp_path.glob(".out.*")), title


def test_output_folders_that_would_cost_data(
    stories_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    occupied, other = tmp_path / "occupied", tmp_path / "other"
    model = broken(stories_path, tmp_path / "model")
    for folder in (occupied, other):
        folder.mkdir()
        (folder / "precious.txt").write_text("mine")
    (occupied / "config.json").write_text("{}")
    (occupied / "model.safetensors").write_text("")
    (other / "config.json").write_text("{}")
    text = occupied / "text.txt"
    text.write_text("Once upon a time. " * 500)
    file = tmp_path / "file"
    file.write_text("x")
    cases: list[tuple[list[str | Path], str]] = [
        (["--out", occupied], "not empty"),
        (["--out", other, "--overwrite"], "holds no model that slimllm has written"),
        (["--out", occupied, "--overwrite"], "holds no model that slimllm has written"),
        (["--out", "/", "--overwrite"], "is the root of the file system"),
        (["--out", tmp_path / ("x" * 250)], "has 250 bytes; give a name of at most 200"),
        (["--out", model, "--overwrite"], "which the run reads"),
        (["--out", tmp_path, "--overwrite"], "which the run reads"),
        (["--out", model / "sub"], "lies in"),
        (["--out", "/dev/null/x"], "not a folder that can be written to"),
        (["--out", file], "is a file"),
        (["--out", occupied, "--overwrite", "--calibration", text], "which the run reads"),
        (["--out", Path.cwd(), "--overwrite"], "current directory"),
    ]
    for arguments, sentence in cases:
        code, _, err = call(capsys, "prune", model, "--ratio", "0.2", "--samples", "4", *arguments)
        assert code == 2 and sentence in err, err
    assert (occupied / "precious.txt").read_text() == (other / "precious.txt").read_text() == "mine"
    assert (model / "model.safetensors").is_file()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kind", ["of an earlier version", "export"])
def test_what_slimllm_has_written_is_replaced_and_nothing_else(
    stories_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    out = tmp_path / "out"
    assert call(capsys, "prune", stories_path, "--out", out, "--ratio", "0.2", "--samples", "4", "--uniform")[0] == 0
    if kind == "export":
        out.rename(tmp_path / "pruned")
        assert call(capsys, "export", tmp_path / "pruned", "--to", "stock", "--out", out)[0] == 0
    elif kind == "of an earlier version":  # whose index does not say who has written it
        index = json.loads((out / "model.safetensors.index.json").read_text())
        del index["metadata"]["slimllm_files"]
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
    again: list[str | Path] = ["prune", stories_path, "--samples", "4", "--out", out, "--overwrite", "--ratio"]
    strangers = ["thesis.txt", ".git/HEAD", "report/notes.png", "model.gguf", "old.safetensors", "sub/x.txt"]
    strangers += [] if kind == "of an earlier version" else ["NOTICE-thesis.txt", "w2v.model", "tokenizer-notes.zip"]
    for stranger in strangers:
        (out / stranger).parent.mkdir(exist_ok=True)
        (out / stranger).write_text("mine")
        code, _, err = call(capsys, *again, "0.3")
        assert code == 2 and f"holds {stranger.replace('/HEAD', '')}, which slimllm has not written" in err, err
        assert (out / stranger).read_text() == "mine"
        (out / stranger).unlink()
        with contextlib.suppress(OSError):  # the folder, if it is empty now
            (out / stranger).parent.rmdir()
    if kind == "export":  # an index that claims a folder of somebody else's
        index = json.loads((out / "model.safetensors.index.json").read_text())
        index["metadata"]["slimllm_files"] += [".git", "thesis"]
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
        for folder in (".git", "thesis"):
            (out / folder).mkdir()
            (out / folder / "mine").touch()
        code, _, err = call(capsys, *again, "0.3")
        assert code == 2 and "holds .git and 1 more" in err and (out / "thesis" / "mine").is_file()
        shutil.rmtree(out / ".git")
        shutil.rmtree(out / "thesis")
    before = (out / "model.safetensors.index.json").read_text()
    assert call(capsys, *again, "0.99")[0] == 2 and (out / "model.safetensors.index.json").read_text() == before
    code, _, err = call(capsys, *again, "0.3")  # and only when the new one is complete
    assert code == 0 and json.loads((out / "report.json").read_text())["config"]["ratio"] == 0.3, err
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_no_room_on_the_disk(
    stories_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    code, _, err = call(capsys, "prune", stories_path, "--out", tmp_path / "out", "--ratio", "0.2")
    assert code == 2 and "are free" in err and not (tmp_path / "out").exists()


def test_disk_full_while_writing(
    stories_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import slimllm.checkpoints.writer

    def save(tensors: dict[str, torch.Tensor], path: Path, **rest: object) -> None:
        if "00003" in path.name:
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(slimllm.checkpoints.writer, "save_file", save)
    code, _, err = call(capsys, "prune", stories_path, "--out", tmp_path / "out", "--ratio", "0.2", "--samples", "4")
    assert code == 2 and "No space left" in err and "with --resume continues from here" in " ".join(err.split())
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]


def test_eval_side_by_side(stories_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "prune", stories_path, "--out", tmp_path / "out", "--ratio", "0.4", "--samples", "4", "--quiet")
    lengths = ["--seq-len", "64", "--seq-len", "128", "--max-windows", "5"]
    options = [*lengths, "--continuations", "3", "--out", tmp_path / "found.json"]
    code, out, err = call(capsys, "eval", stories_path, tmp_path / "out", *options)
    assert code == 0, err
    found = json.loads((tmp_path / "found.json").read_text())
    dense, pruned = found["models"]
    assert found["text"] == "bundled" and dense["parameters"] > pruned["parameters"]
    assert (found["max_windows"], dense["dtype"], dense["device"]) == (5, "float32", "cpu")
    assert found["versions"]["torch"] == torch.__version__
    model, tokenizer = slimllm.load(tmp_path / "out")
    tokens = tokenize(tokenizer, [bundled_text("evaluation")])
    for length in (64, 128):
        wanted = slimllm.perplexity(model, tokens, seq_len=length, max_windows=5, bos_token_id=tokenizer.bos_token_id)
        assert pruned["perplexity"][str(length)] == pytest.approx(wanted, rel=1e-9)
        increase = math.log(wanted / dense["perplexity"][str(length)])
        assert pruned["log_increase"][str(length)] == pytest.approx(increase, rel=1e-9) and increase > 0.01
        assert dense["log_increase"][str(length)] == 0 and pruned["windows"][str(length)] == 5
        assert f"{wanted:.2f}" in out and f"{increase:.3f}" in out
    wanted = repetition(model, tokens, continuations=3, bos_token_id=tokenizer.bos_token_id)
    assert pruned["repetition"] == pytest.approx(wanted) and f"{wanted:.0%}" in out and f"repeated {wanted:.1%}" in out
    assert found["continuations"] == 3 and dense["repetition"] is not None
    code, _, err = call(capsys, "eval", stories_path, "--out", tmp_path / "found.json")
    assert code == 2 and "found.json exists already" in err
    code, _, err = call(capsys, "eval", stories_path, "--out", tmp_path / "no" / "found.json")
    assert code == 2 and "There is no folder" in err
    code, out, err = call(capsys, "eval", stories_path, tmp_path / "nowhere")
    assert code == 2 and "There is no folder or file" in err and "perplexity" not in out


def test_eval_of_different_tokenizers(stories_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(stories_path, tmp_path / "lower")
    tokenizer = json.loads((stories_path / "tokenizer.json").read_text())
    tokenizer["normalizer"]["normalizers"].append({"type": "Lowercase"})
    (tmp_path / "lower" / "tokenizer.json").write_text(json.dumps(tokenizer))
    options = ["--max-windows", "2", "--out", tmp_path / "found.json"]
    code, out, _ = call(capsys, "eval", stories_path, tmp_path / "lower", *options)
    assert code == 0 and "these perplexities cannot be compared" in " ".join(out.split())
    _, other = json.loads((tmp_path / "found.json").read_text())["models"]
    assert other["log_increase"] == {} and f"{other['perplexity']['128']:.2f}" in out


def test_eval_errors(stories_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time")
    cases: list[tuple[list[str | Path], str]] = [
        ([tmp_path / "nowhere"], "There is no folder or file"),
        (["no-one/of-this-name-here"], "the hub, where it may be a model, cannot be reached"),
        ([tmp_path], "holds no config.json"),
        ([stories_path, "--max-windows", "0"], "max_windows must be at least 1, got 0"),
        ([stories_path, "--text", short], "fewer than one window"),
        ([stories_path, "--seq-len", "600"], "at most 512"),
        ([stories_path, "--seq-len", "1"], "at least 2"),
        ([stories_path, "--dtype", "int4"], "dtype must be one of"),
        ([stories_path, "--device", "cuda:99"], "torch sees"),
    ]
    for arguments, sentence in cases:
        code, _, err = call(capsys, "eval", *arguments)
        assert code == 2 and sentence in err, err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import slimllm

    assert call(capsys, "--version")[:2] == (0, f"{slimllm.__version__}\n")


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = call(capsys, "doctor")
    assert code == 0
    for operation in ("gram_", "head_covariance", "pearson_greedy", "feature_space_importance", "column_sums_"):
        assert any(operation in line and " torch " in line for line in out.splitlines()), operation
    for operation in ("lstsq", "half_solve_"):
        assert any(operation in line and (" extension " in line or " torch " in line) for line in out.splitlines()), (
            operation
        )
    assert importlib.metadata.version("torch") in out and "slimllm._C" in out and "kernels are for GPUs" in out
    monkeypatch.setenv("SLIMLLM_BACKEND", "cuda")
    code, out, err = call(capsys, "doctor")
    assert code == 2 and "SLIMLLM_BACKEND must be one of auto, torch, triton, extension, got 'cuda'" in err and not out
    monkeypatch.setenv("SLIMLLM_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if not torch.cuda.is_available():
        code, out, _ = call(capsys, "doctor")
        words = "SLIMLLM_BACKEND=triton was asked for, but" if triton_is_missing() else "SLIMLLM_BACKEND=triton needs a GPU"
        assert code == 0 and words in out and "none" in out


@pytest.mark.slow
def test_bench(tmp_path: Path, stories_path: Path) -> None:
    done = run("bench", stories_path, "--layers", "1", "--samples", "2", "--seq-len", "32", "--plot", "a.svg", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "stories260k, 1 layer, 2×32" in " ".join(done.stdout.split())
    assert len((tmp_path / "slimllm-bench.jsonl").read_text().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "slimllm-bench.jsonl"]
    done = run("bench", stories_path, "--ratio", "1.5", "--out", "none.jsonl", cwd=tmp_path)
    assert done.returncode == 2 and "must lie between 0 and 1, got 1.5" in done.stderr and "Traceback" not in done.stderr, (
        done.stderr
    )
    assert not (tmp_path / "none.jsonl").exists()


def test_uniform_and_export(capsys: pytest.CaptureFixture[str], stories_path: Path, tmp_path: Path) -> None:
    pruning = ("prune", stories_path, "--ratio", "0.3", "--samples", "4")
    code, _, err = call(capsys, *pruning, "--out", tmp_path / "x", "--uniform", "--allocation", "auto")
    assert code == 2 and "--uniform is --allocation uniform" in err and not (tmp_path / "x").exists()
    assert call(capsys, *pruning, "--out", tmp_path / "alike", "--uniform")[0] == 0
    assert call(capsys, *pruning, "--out", tmp_path / "own")[0] == 0
    for model, to, out, architecture in (
        ("alike", "stock", "stock", "seed_oss"),
        ("own", "padded", "padded", "seed_oss"),
        ("own", "gguf", "m.gguf", "deci"),
    ):
        code, printed, _ = call(capsys, "export", tmp_path / model, "--to", to, "--out", tmp_path / out)
        assert code == 0 and f"with the architecture {architecture}" in printed
        assert (tmp_path / out).exists()
    code, _, err = call(capsys, "export", tmp_path / "own", "--to", "stock", "--out", tmp_path / "no")
    assert code == 2 and "give --to padded" in err and not (tmp_path / "no").exists()
