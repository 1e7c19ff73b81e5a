"""Fuzzer of input files: every damaged or hostile file must be refused with a sentence, or read correctly.

    python tests/fuzz.py [--seconds 600] [--seed 0] [--trial NUMBER]

A trial changes one file of a good input, seeded by its number, and makes slimllm read it within limits of time and memory.
An accepted file must agree with another reader of the same file: transformers for models and tokenizers, gguf-py for the
tensors of GGUF files. A table counts trials, refusals, and files that were accepted and right. Every fault is printed with
the number of its trial, and the exit status is then 1.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gzip
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

import slimllm
from slimllm import InputError, PruneConfig
from slimllm.calibration import is_unicode, read_texts
from slimllm.checkpoints.opening import open_checkpoint
from slimllm.checkpoints.source import CheckpointModel
from slimllm.checkpoints.tokenizer import encode, load_tokenizer, tokenizer_code
from slimllm.cli.display import print_summary
from slimllm.experiments.bench.forecast import forecast
from slimllm.export.api import export
from slimllm.pruning.report import PruneReport
from slimllm.report import write_page

STORIES = Path(str(resources.files("slimllm") / "calibration" / "data" / "stories260k"))
SECONDS, MEMORY = 20, 2 * 2**30  # limits of a trial: seconds, and bytes of address space on top of those at the start
LONGEST_SENTENCE = 1010

DEEP = "[" * 100_000 + "]" * 100_000
ODD: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    2**31,
    10**9,
    10**30,
    -0.5,
    1e308,
    "",
    "x",
    "[/b]:smile:$x$",
    "\x00",
    "\udcff",
    [],
    {},
    [None],
    [[]],
    {"": None},
    "a" * 100_000,
    list(range(1000)),
    "../../etc/passwd",
    "/dev/zero",
]


class Fault(BaseException):
    """Failure of a trial; a BaseException, so that the code under test does not catch it."""


# --- changing files


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:5]) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def change_json(content: Any, draw: random.Random) -> str:
    """Return a JSON text with parts removed, replaced, renamed or added; sometimes it is not JSON at all."""
    text = json.dumps(content)
    kind = draw.randrange(12)
    if kind == 2:  # the same content in another order, with more white space
        names = list(content)
        draw.shuffle(names)
        return json.dumps({name: content[name] for name in names}, indent=draw.choice([None, 1, 4]))
    if kind == 0:
        return change_bytes(text.encode(), draw).decode("latin1")
    if kind == 1:
        return draw.choice(["", "null", "[]", "3", '"x"', "{}", DEEP, '{"a":' * 5000, "NaN", "\ufeff" + text, text + text])
    content = copy.deepcopy(content)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        places = list(_places(content))
        if not places:
            break
        *outer, last = draw.choice(places)
        holder = content
        for key in outer:
            holder = holder[key]
        action = draw.randrange(5)
        if action == 0:
            del holder[last]
        elif action == 1 and isinstance(holder, dict):
            holder[draw.choice(["x", "hidden_size", "auto_map", "text_config", ""])] = holder.pop(last)
        elif action == 2 and isinstance(holder[last], int | float) and not isinstance(holder[last], bool):
            holder[last] = draw.choice([holder[last] + 1, holder[last] * 2, holder[last] // 2, -holder[last], math.nan])
        else:
            holder[last] = copy.deepcopy(draw.choice(ODD))
    return json.dumps(content)


def change_bytes(content: bytes, draw: random.Random, most: int | None = None) -> bytes:
    """Return the bytes with some replaced, cut off, doubled, or overwritten by a number of four or eight bytes."""
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 8])):
        at = draw.randrange(min(len(changed), most or len(changed)) or 1)
        kind = draw.randrange(5)
        if kind == 0:
            changed[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            del changed[at:]
        elif kind == 2:
            changed[at:at] = changed[at : at + draw.choice([1, 8, 1000])]
        elif kind == 3:
            changed[at : at + 8] = struct.pack("<Q", draw.choice([0, 1, 2**31, 2**40, 2**63, 2**64 - 1]))
        else:
            changed[at : at + 4] = struct.pack("<I", draw.choice([0, 1, 8, 9, 12, 255, 10**9, 2**32 - 1]))
        if not changed:
            break
    return bytes(changed)


# --- reading files, and checking what was read


def check_model(folder: Path) -> None:
    """Plan a run and prune the model; the dense model's perplexity must equal that of transformers' model."""
    with contextlib.suppress(InputError):  # plan reads config.json alone
        forecast(str(folder), PruneConfig(ratio=0.2, samples=2, seq_len=16), for_gpu=True)
    out = folder.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    ids = (torch.arange(64).view(4, 16) * 7) % 500
    try:
        report = slimllm.prune(folder, out, PruneConfig(ratio=0.2, calibration=ids, device="cpu"))
    finally:
        left = [path.name for path in folder.parent.iterdir() if path.name.startswith(".out")]
        if left:
            raise Fault(f"it leaves {left} on the disk")
    try:
        model, about = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, torch_dtype=torch.float32)
    except Exception:
        if not (folder / "model.safetensors.index.json").is_file():
            raise
        # transformers needs more from an index than the files of tensors, which alone matter here.
        model, about = AutoModelForCausalLM.from_pretrained(STORIES, output_loading_info=True, torch_dtype=torch.float32)
    if about["missing_keys"] or about["mismatched_keys"]:
        raise Fault(f"transformers misses {sorted(about['missing_keys'])[:3]}")
    with torch.no_grad():
        logits = model.eval()(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    right, got = min(float(loss), 700.0), math.log(report.calibration["perplexity_dense"])
    if not abs(right - got) <= 1e-3 * max(1.0, abs(right)):
        raise Fault(f"the loss is {got}, in transformers {right}")


def check_gguf(path: Path) -> None:
    """Check that all tensors equal those that gguf-py reads."""
    checkpoint = open_checkpoint(path)
    CheckpointModel(checkpoint, torch.device("cpu"), torch.float32)
    tensors = checkpoint.read(checkpoint.shapes())
    stored = sorted(
        float(np.abs(dequantize(tensor.data, tensor.tensor_type).astype(np.float64)).sum())
        for tensor in gguf.GGUFReader(path).tensors
        if tensor.name != "rope_freqs.weight"
    )
    ours = sorted(float(tensor.double().abs().sum()) for tensor in tensors.values())
    if not np.allclose(stored, ours, rtol=1e-6):
        raise Fault("the tensors differ from gguf-py's")


def check_tokenizer(folder: Path) -> None:
    """Check that the tokenizer gives the same tokens as when transformers loads it."""
    text = "Once upon a time, there was a [/b] :smile: little girl.\n"
    ours = load_tokenizer(folder)
    try:
        right = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception:
        if tokenizer_code(folder) is None:  # only a tokenizer whose own code is not run may be read by a generic class
            raise
        right = PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
    if encode(ours, text) != right(text)["input_ids"]:
        raise Fault("the tokens differ from those of transformers")


def check_report(folder: Path) -> None:
    """Show a report on the terminal and, for one in twelve, as a page, which takes seconds."""
    report = PruneReport.read(folder)
    print_summary(Console(file=io.StringIO(), markup=False, emoji=False), report)
    if zlib.crc32(folder.joinpath("report.json").read_bytes()) % 12:
        return
    page = write_page(folder).read_text()
    if "<script" in page.lower():
        raise Fault("the page has a script")


def check_text(path: Path) -> None:
    """Check that documents are valid Unicode, and not JSON or other notation read as text."""
    documents = read_texts(path, 2000, seed=0)
    if not documents or not all(isinstance(document, str) and is_unicode(document) for document in documents):
        raise Fault("the result is not text")
    if path.suffix == ".jsonl" and any(document.lstrip().startswith(('{"text"', "None")) for document in documents):
        raise Fault(f"the notation is read as text: {documents[0][:60]!r}")


# --- the inputs


class Inputs:
    """Good files, made once, and the changes made to them."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.model = place / "good" / "model"
        shutil.copytree(STORIES, self.model)
        tensors = load_file(self.model / "model.safetensors")
        self.shards = place / "good" / "shards"
        shutil.copytree(STORIES, self.shards)
        (self.shards / "model.safetensors").unlink()
        names = sorted(tensors)
        parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for file, own in parts.items():
            save_file({name: tensors[name] for name in own}, self.shards / file, metadata={"format": "pt"})
        index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file, own in parts.items() for name in own}}
        (self.shards / "model.safetensors.index.json").write_text(json.dumps(index))
        export(STORIES, place / "good" / "model.gguf", "gguf")
        self.pruned = place / "good" / "pruned"
        slimllm.prune(STORIES, self.pruned, PruneConfig(ratio=0.2, samples=2, seq_len=32, device="cpu"))
        lines = [{"text": f"It was night number {number}, and it rained."} for number in range(50)]
        self.texts = {
            "text.txt": "\n".join(line["text"] for line in lines).encode(),
            "text.jsonl": "\n".join(map(json.dumps, lines)).encode(),
            "text.json": json.dumps(lines).encode(),
            "text.csv": b"text,other\n" + b"".join(f'"{line["text"]}",1\n'.encode() for line in lines),
            "text.jsonl.gz": gzip.compress("\n".join(map(json.dumps, lines)).encode(), mtime=0),
        }

    def trial(self, number: int) -> tuple[str, Callable[[], None]]:
        """Return what a trial changes, and a function that checks the changed file."""
        draw = random.Random(number)
        work = self.place / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        target = list(TARGETS)[number % len(TARGETS)]
        return target, TARGETS[target](self, work, draw)

    def json_of(self, source: Path, work: Path, file: str, draw: random.Random) -> Path:
        """Return a copy of a folder in which one JSON file is changed."""
        folder = work / "model"
        shutil.copytree(source, folder)
        text = change_json(json.loads((folder / file).read_text()), draw)
        (folder / file).write_text(text, encoding="utf-8", errors="surrogatepass")
        return folder


def _safetensors(inputs: Inputs, work: Path, draw: random.Random) -> Callable[[], None]:
    folder = work / "model"
    shutil.copytree(inputs.model, folder)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    if draw.random() < 0.5:
        header = change_json(json.loads(content[8 : 8 + size]), draw).encode("utf-8", "surrogatepass")
        content = len(header).to_bytes(8, "little") + header + content[8 + size :]
    else:
        content = change_bytes(content, draw, size + 8)
    file.write_bytes(content)
    return lambda: check_model(folder)


def _gguf(inputs: Inputs, work: Path, draw: random.Random) -> Callable[[], None]:
    content = (inputs.place / "good" / "model.gguf").read_bytes()
    header = content.index(b"\x00" * 32) if draw.random() < 0.2 else draw.choice([64, 2000, 20000])
    (work / "model.gguf").write_bytes(change_bytes(content, draw, header))
    return lambda: check_gguf(work / "model.gguf")


def _text(inputs: Inputs, work: Path, draw: random.Random) -> Callable[[], None]:
    name = draw.choice(list(inputs.texts))
    content = inputs.texts[name]
    if name == "text.jsonl" and draw.random() < 0.7:
        lines = content.decode().splitlines()
        for _ in range(draw.choice([1, 5, 50])):
            at = draw.randrange(len(lines))
            lines[at] = change_json(json.loads(inputs.texts["text.jsonl"].decode().splitlines()[at]), draw)
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
    else:
        content = change_bytes(content, draw)
    (work / name).write_bytes(content)
    return lambda: check_text(work / name)


def _json(source: str, file: str, check: Callable[[Path], None]) -> Callable[..., Callable[[], None]]:
    def prepare(inputs: Inputs, work: Path, draw: random.Random) -> Callable[[], None]:
        folder = inputs.json_of(getattr(inputs, source), work, file, draw)
        return lambda: check(folder)

    return prepare


TARGETS: dict[str, Callable[..., Callable[[], None]]] = {
    "config.json": _json("model", "config.json", check_model),
    "index": _json("shards", "model.safetensors.index.json", check_model),
    "safetensors": _safetensors,
    "GGUF": _gguf,
    "tokenizer.json": _json("model", "tokenizer.json", check_tokenizer),
    "tokenizer_config.json": _json("model", "tokenizer_config.json", check_tokenizer),
    "report.json": _json("pruned", "report.json", check_report),
    "text": _text,
}


# --- running


def _what_is_wrong_with(error: InputError) -> str:
    """Return what is wrong with a refusal: it is not a sentence, or memory ran out; empty if nothing is."""
    text, cause = str(error), error.__cause__ or error.__context__
    while cause is not None:
        if isinstance(cause, MemoryError) or "allocate" in str(cause):
            return f"it needs more than {MEMORY >> 20} MiB"
        cause = cause.__cause__ or cause.__context__
    if "\n" in text or not text.rstrip().endswith((".", "?", ")")) or len(text) > LONGEST_SENTENCE:
        return f"the message is not a sentence: {text[:300]!r}"
    return ""


def _alarm(number: int, frame: object) -> None:
    raise Fault(f"it takes more than {SECONDS} s")


def run_trial(inputs: Inputs, number: int) -> tuple[str, str, str]:
    """Run a trial; return what was changed, the outcome (refused, accepted, fault), and the message."""
    target, check = inputs.trial(number)
    signal.alarm(SECONDS)
    try:
        check()
    except InputError as error:
        fault = _what_is_wrong_with(error)
        return target, "fault" if fault else "refused", fault or str(error)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of a Rust library is not an Exception
        return target, "fault", f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        signal.alarm(0)
    return target, "accepted", ""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0, help="The number of the first trial.")
    parser.add_argument("--trial", type=int, help="Run only this trial, and print its outcome.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    signal.signal(signal.SIGALRM, _alarm)
    counts: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory(prefix="slimllm-fuzz-") as place:
        inputs = Inputs(Path(place))
        bound = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (bound, resource.RLIM_INFINITY))
        if arguments.trial is not None:
            print(*run_trial(inputs, arguments.trial), sep=": ")
            return 0
        end, number = time.monotonic() + arguments.seconds, arguments.seed
        while time.monotonic() < end:
            target, outcome, about = run_trial(inputs, number)
            counts[target, outcome] += 1
            if outcome == "fault":
                print(f"FAULT trial {number}, {target}: {about}", flush=True)
            number += 1
    print(f"{'changed':24}{'tried':>8}{'refused':>10}{'right':>8}{'faults':>8}")
    for target in TARGETS:
        refused, right, faults = (counts[target, outcome] for outcome in ("refused", "accepted", "fault"))
        print(f"{target:24}{refused + right + faults:8}{refused:10}{right:8}{faults:8}")
    return min(1, sum(number for (_, outcome), number in counts.items() if outcome == "fault"))


if __name__ == "__main__":
    sys.exit(main())
