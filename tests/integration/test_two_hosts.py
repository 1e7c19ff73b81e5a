"""Two hosts, which are network namespaces of this one with a cable between them: torchrun on both, over gloo, as root."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import STORIES
from test_parallel import assert_close, torchrun

HOSTS = {"slim-a": "10.77.0.1", "slim-b": "10.77.0.2"}
LONG = ["--samples", "100", "--seq-len", "512", "--batch-size", "1"]


def ip(command: str) -> bool:
    return shutil.which("ip") is not None and subprocess.run(["ip", *command.split()], capture_output=True).returncode == 0


def kill(host: str) -> None:
    """Kill all its processes: torchrun, and those that it started in sessions of their own."""
    found = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True).stdout.split()
    for process in found:
        os.kill(int(process), signal.SIGKILL)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Path]:
    """The folder in which each host has its own, from which it runs."""
    if not all(ip(f"netns add {host}") for host in HOSTS):
        for host in HOSTS:
            ip(f"netns del {host}")
        pytest.skip("network namespaces cannot be made here")
    assert ip("link add eth-a netns slim-a type veth peer name eth-b netns slim-b")
    for host, address in HOSTS.items():
        assert ip(f"-n {host} addr add {address}/24 dev eth-{host[-1]}")
        assert ip(f"-n {host} link set eth-{host[-1]} up") and ip(f"-n {host} link set lo up")
        (tmp_path / host).mkdir()
    yield tmp_path
    for host in HOSTS:
        kill(host)
        ip(f"netns del {host}")


def start(folder: Path, host: str, *arguments: str) -> subprocess.Popen[str]:
    command = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    command += ["--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{HOSTS['slim-a']}:29500"]
    command += ["--rdzv-id", "test", "--local-addr", HOSTS[host]]
    command += ["--rdzv-conf", f"is_host={int(host == 'slim-a')}"]  # they have one name, by which torchrun would tell
    command += ["-m", "slimllm", "prune", str(STORIES), "--out", "out", "--ratio", "0.3", *arguments]
    environment = {**os.environ, "COLUMNS": "200", "GLOO_SOCKET_IFNAME": f"eth-{host[-1]}"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder / host, stdout=pipe, stderr=pipe, text=True, env=environment)


def both(folder: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    return [start(folder, host, *arguments) for host in HOSTS]


def out_of(folder: Path) -> Path:
    """The output: the host that rendezvous made the first one has it."""
    (found,) = folder.glob("slim-*/out")
    return found


@pytest.mark.slow
def test_as_two_processes_of_one_host(hosts: Path, tmp_path: Path) -> None:
    small = ["--samples", "11", "--seq-len", "64", "--batch-size", "3", "--no-page"]
    told = [process.communicate(timeout=180) for process in both(hosts, *small)]
    assert sum(out.count("parameters of the layers") for out, _ in told) == 1, told
    (tmp_path / "one").mkdir()
    _, err = torchrun(tmp_path / "one", *small).communicate(timeout=180)
    assert (tmp_path / "one" / "out").is_dir(), err
    assert_close(tmp_path / "one" / "out", out_of(hosts))
    for shard in (tmp_path / "one" / "out").glob("*.safetensors"):  # sums are added in the same order
        assert shard.read_bytes() == (out_of(hosts) / shard.name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["slim-a", "slim-b"])
def test_a_host_is_lost(hosts: Path, lost: str) -> None:
    """The other one says so, and the run goes on from its journal."""
    processes = dict(zip(HOSTS, both(hosts, *LONG)))
    deadline = time.monotonic() + 120
    while not any(len(path.read_bytes().splitlines()) > 2 for path in hosts.glob("slim-*/.out.partial/journal.jsonl")):
        time.sleep(0.02)
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes.values()):
            for host in HOSTS:
                kill(host)
            pytest.fail(str([process.communicate() for process in processes.values()]))
    kill(lost)
    left = processes[next(host for host in HOSTS if host != lost)]
    _, err = left.communicate(timeout=180)
    assert left.returncode != 0 and "Another process of this run has ended or does not answer" in err, err
    processes[lost].communicate()
    told = [process.communicate(timeout=300) for process in both(hosts, *LONG, "--resume", "--no-page")]
    assert any("Resuming after layer" in out for out, _ in told), told
    assert out_of(hosts).is_dir()
