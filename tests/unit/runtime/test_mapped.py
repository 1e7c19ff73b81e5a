"""Tensors in files: a Gram that is larger than the memory for it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from slimllm.runtime.mapped import GramInFile, in_file
from slimllm.statistics import GramStatistics


def resident(tensor: torch.Tensor) -> int:
    """Bytes of the tensor's mapping that are in this process's memory."""
    found = re.search(rf"^{tensor.data_ptr():x}-.*?^Rss: +(\d+) kB", Path("/proc/self/smaps").read_text(), re.M | re.S)
    assert found
    return 1024 * int(found[1])


@pytest.fixture
def tiles_of_64_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimllm.statistics.gram.TILE", 64)
    monkeypatch.setattr("slimllm.runtime.mapped.TILE", 64)
    monkeypatch.setattr("slimllm.runtime.mapped.WAITING", 300)


def test_a_tensor_in_a_file(tmp_path: Path) -> None:
    tensor = in_file((3, 5), torch.bfloat16, tmp_path)
    assert not list(tmp_path.iterdir()) and tensor.shape == (3, 5) and not tensor.any()
    assert in_file((2,), torch.float64, tmp_path / "out that is made later").dtype == torch.float64
    assert in_file((0, 4), torch.float32, None).shape == (0, 4)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_gram_in_a_file_is_that_in_memory(weighted: bool, tmp_path: Path, tiles_of_64_rows: None) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 1030, generator=generator) + 20 * torch.randn(1030, generator=generator)
    weight = torch.rand(500, generator=generator) if weighted else None
    gram, wanted, part = GramInFile(1030, None, tmp_path), GramStatistics(1030), GramStatistics(1030)
    assert not list(tmp_path.iterdir())
    for rows in (slice(0, 130), slice(130, 310), slice(310, 400)):
        for one in (gram, wanted):
            one.update(x[rows], None if weight is None else weight[rows])
        assert resident(gram.gram) < gram.gram.nbytes / 4
    part.update(x[400:], None if weight is None else weight[400:])
    projection = torch.randn(7, 1030, generator=generator) / 1030**0.5
    columns = torch.randperm(1030, generator=generator)[:300]
    for step in (lambda one: None, lambda one: one.merge(part), lambda one: one.move(x[77])):
        for one in (gram, wanted):
            step(one)
        for result in (
            lambda one: one.covariance(),
            lambda one: one.variance(),
            lambda one: one.rows(slice(100, 130)),
            lambda one: one.block(columns[:20], columns),
            lambda one: one.of_product(projection),
        ):
            assert torch.allclose(result(gram), result(wanted), atol=2e-5)
            assert resident(gram.gram) < gram.gram.nbytes / 4
    *rows, total = (one.clone() for one in gram.sums())
    assert resident(gram.gram) < gram.gram.nbytes / 4
    assert torch.equal(torch.cat(rows), gram.gram) and torch.equal(total, gram.total)
