"""OpenMP's threads while other processes need the cores. How much it helps is measured by benchmarks/bench_contended.py."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORIES

import slimllm
from slimllm.evaluation.side_by_side import evaluate
from slimllm.finetuning import FinetuneConfig, finetune
from slimllm.runtime import cores
from slimllm.runtime.cores import Times, share_cores

pytestmark = pytest.mark.skipif(cores._openmp() is None, reason="not GNU's OpenMP")


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setattr(cores, "_INTERVAL_S", 0.02)
    torch.set_num_threads(2)
    torch.zeros(1 << 20).add_(1)  # starts the second thread
    yield
    torch.set_num_threads(1)


def threads() -> set[str]:
    return {task.name for task in Path("/proc/self/task").iterdir()}


def names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def within_10_s(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_threads_sleep_while_others_need_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threads()  # those that earlier tests have left may end meanwhile
    asleep = cores._CORES  # with the two that compute, more than there are cores
    monkeypatch.setattr(cores, "_NEED", -math.inf)
    with share_cores():
        assert within_10_s(lambda: len(threads() - before) == 1 + asleep)
        monkeypatch.setattr(cores, "_NEED", math.inf)
        assert within_10_s(lambda: len(threads() - before) == 1)
        monkeypatch.setattr(cores, "_NEED", -math.inf)
        assert within_10_s(lambda: len(threads() - before) == 1 + asleep)
    assert within_10_s(lambda: not threads() - before)


def test_threads_spin_less_while_others_sleep() -> None:
    """The processor time that two threads take while there is nothing to do, after each of many small operations."""
    x = torch.zeros(1 << 17)

    def spent() -> float:
        start = time.process_time()
        for _ in range(20):
            x.add_(1)
            time.sleep(0.01)
        return time.process_time() - start

    spinning = min(spent() for _ in range(3))
    asleep = cores._Asleep(cores._CORES)
    sleeping = min(spent() for _ in range(3))
    asleep.end()
    assert sleeping < spinning / 2


def test_one_watch_for_all_users() -> None:
    with share_cores():
        first = cores._watch
        with share_cores():
            assert cores._watch is first is not None
        other, inside, leave = [], threading.Event(), threading.Event()

        def use() -> None:
            with share_cores():
                other.append(cores._watch)
                inside.set()
                leave.wait()

        thread = threading.Thread(target=use)
        thread.start()
        assert inside.wait(10) and other == [first]
    assert cores._watch is first  # the other thread still computes
    leave.set()
    thread.join()
    assert cores._watch is None and "slimllm-cores" not in names()


def test_it_ends_with_an_exception() -> None:
    with pytest.raises(KeyError), share_cores():
        raise KeyError
    assert cores._watch is None and "slimllm-cores" not in names()


@pytest.mark.parametrize("why", ["a single thread", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "another OpenMP"])
def test_nothing_is_watched(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "a single thread":
        torch.set_num_threads(1)
    elif why == "another OpenMP":
        monkeypatch.setattr(cores, "_openmp", lambda: None)
    else:
        monkeypatch.setenv(why, "1")
    with share_cores():
        assert cores._watch is None and "slimllm-cores" not in names()


def test_a_system_that_does_not_say_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreadable() -> Times:
        raise PermissionError("/proc/stat")

    monkeypatch.setattr(Times, "now", unreadable)
    with caplog.at_level(logging.DEBUG, "slimllm"), share_cores():
        assert within_10_s(lambda: "slimllm-cores" not in names())
    assert "PermissionError: /proc/stat" in caplog.text


@pytest.mark.parametrize(
    ("idle", "own", "num_threads", "needed"),
    [
        ([0.0, 0.0], 2.0, 2, False),  # this process has both cores
        ([0.8, 0.0], 1.2, 2, False),  # it has one, and a part of the other
        ([0.0, 0.8], 1.0, 2, False),  # others have a fifth of a core
        ([0.0, 0.5], 1.0, 2, True),  # others have half a core
        ([0.0, 0.0], 1.0, 2, True),  # others have a core
        ([0.0, 0.0, 1.0, 0.0], 2.0, 2, False),  # others have a core that is free
        ([0.0, 0.0, 0.0, 0.0], 1.5, 2, True),  # others have two and a half
        ([0.0, 0.0], 2.0, 4, True),  # more threads than cores
        ([], 1.0, 2, False),  # the system does not name its cores
        ([0.0], 1.0, 2, False),  # a core went off in between
    ],
)
def test_need(idle: list[float], own: float, num_threads: int, needed: bool) -> None:
    before = Times([10.0] * (len(idle) + (idle == [0.0])), 100.0, 1000.0)
    after = Times([10 + 2 * seconds for seconds in idle], 100 + 2 * own, 1002.0)
    assert after.needed_by_others(before, num_threads) is needed


def test_long_work_shares_the_cores(tmp_path: Path) -> None:
    model, seen = str(STORIES), []

    def progress(event: Any) -> None:
        seen[-1].append(cores._watch is not None)

    def watched(work: Callable[[], object]) -> bool:
        seen.append([])
        work()
        return bool(seen[-1]) and all(seen[-1])

    loaded, tokenizer = slimllm.load(model)
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little fox. " * 40)
    config = slimllm.PruneConfig(0.2, "slimllm", samples=2, seq_len=32)
    quick = FinetuneConfig(max_steps=1, held_out=0, seq_len=32)
    assert watched(lambda: slimllm.perplexity(loaded, torch.arange(3, 99), seq_len=32, progress=progress))
    assert watched(lambda: evaluate([model], str(text), seq_lens=[32], progress=progress))
    assert watched(lambda: slimllm.prune(model, tmp_path / "out", config, progress=progress))
    assert watched(lambda: slimllm.prune_model(loaded, tokenizer, config, progress=progress))
    assert watched(lambda: finetune(model, text, tmp_path / "tuned", quick, progress=progress))
    assert cores._watch is None


def test_another_process_is_seen() -> None:
    core = min(os.sched_getaffinity(0))
    busy = f"import os; os.sched_setaffinity(0, {{{core}}}); print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout and process.stdout.readline()
            before = Times.now()
            time.sleep(1)
            assert Times.now().needed_by_others(before, len(before.idle))
        finally:
            process.kill()
