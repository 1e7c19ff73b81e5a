from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "simulated_cuda" not in sys.modules:  # on the simulated GPU the choice takes a minute
    os.environ["SLIMLLM_BACKEND"] = "auto"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # as the command line sets it, before transformers is imported
os.environ["COLUMNS"] = "200"  # keeps printed lines unbroken
# Without a GPU, kernels run under the interpreter, which must be chosen before triton is imported.
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from slimllm import PruneConfig, prune
from slimllm.calibration import Calibration, bundled_text, draw_windows, tokenize
from slimllm.checkpoints.opening import open_checkpoint
from slimllm.checkpoints.source import InMemoryModel
from slimllm.methods.allocation.target import allocate
from slimllm.ops.dispatch import triton_is_missing
from slimllm.plugins import ALLOCATIONS, CRITERIA, EXPORTERS, RECOVERIES
from slimllm.pruning.context import RunContext
from slimllm.pruning.dense_pass import run_dense_pass
from slimllm.pruning.pipeline import Pruning
from slimllm.pruning.shapes import layer_shapes
from slimllm.runtime.hidden_states import Placement
from slimllm.runtime.progress import LayerMeasured, LayerPruned, PartWritten, Progress, ProgressCallback, StepTrained
from slimllm.runtime.stopwatch import Stopwatch

# The models are tiny: more threads only slow the tests down on a busy machine.
torch.set_num_threads(1)


def kernels_are_missing() -> str:
    """Return why the Triton kernels do not run here, or an empty string. Triton 3.6's interpreter fails with new numpy."""
    if missing := triton_is_missing():
        return missing
    numpy = tuple(map(int, version("numpy").split(".")[:2]))
    if os.environ.get("TRITON_INTERPRET") == "1" and version("triton").startswith("3.6.") and numpy >= (2, 3):
        return f"triton {version('triton')} cannot interpret them with numpy {version('numpy')}"
    return ""


# A test, or a parameter of one, that needs the Triton kernels.
needs_kernels = pytest.mark.skipif(bool(kernels_are_missing()), reason=f"no kernels: {kernels_are_missing()}")


@pytest.fixture(autouse=True)
def cpu_by_default(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the CPU the default device, also beside a GPU: many tests compare a run with a model on the CPU, bit by bit.

    The tests of a GPU and of operations ask for their devices.
    """
    if not {"gpu", "ops", "statistics"} & set(request.path.parts):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill uninitialised memory of torch with NaN (or the largest integer) instead of leftover values."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


STORIES = Path(str(resources.files("slimllm") / "calibration" / "data" / "stories260k"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU in this machine"))
        if "real_device" in item.keywords and "simulated_cuda" in sys.modules:
            item.add_marker(pytest.mark.skip(reason="the simulated GPU cannot do this"))


@pytest.fixture(scope="session")
def stories_path() -> Path:
    """Return the folder of the bundled, trained LLaMA: 5 layers, 8 heads in 4 KV groups, hidden 64, intermediate 172."""
    return STORIES


@pytest.fixture
def stories(stories_path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(stories_path).eval()


@pytest.fixture(scope="session")
def token_ids(stories_path: Path) -> torch.Tensor:
    """Return windows of real text, (16, 64)."""
    tokens = tokenize(open_checkpoint(stories_path).tokenizer(), [bundled_text("calibration")[:60_000]])
    return draw_windows(tokens, samples=16, seq_len=64, seed=0)


def random_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """Make a seeded random LLaMA whose activations are hard for statistics: large means, dead and dominating channels."""
    settings: dict[str, object] = {
        "vocab_size": 128,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
    }
    settings |= changes
    if transformers.__version__ < "5" and "rope_parameters" in settings:
        scaling = dict(settings.pop("rope_parameters"))  # type: ignore[call-overload]
        settings |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    config = LlamaConfig(**settings)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3)
        for layer in model.model.layers:
            if layer.self_attn.v_proj.bias is not None:
                layer.self_attn.v_proj.bias.normal_(0, 30.0)  # makes inputs of o_proj with mean ≫ spread
                layer.self_attn.o_proj.bias.normal_()
            if layer.mlp.up_proj.bias is not None:
                layer.mlp.gate_proj.bias.normal_(0, 2.0)
                layer.mlp.up_proj.bias.normal_(0, 5.0)
                layer.mlp.up_proj.bias[3] = 0.0
                layer.mlp.down_proj.bias.normal_()
            layer.mlp.up_proj.weight[3] = 0.0  # a dead channel
            layer.mlp.down_proj.weight[:, 7] *= 30.0  # a dominating channel
    return model


def config(token_ids: torch.Tensor, ratio: float = 0.3, **settings: Any) -> PruneConfig:
    """Settings on these windows; of the paper's method, the fastest, if the preset is not given."""
    return PruneConfig(ratio=ratio, calibration=token_ids, **{"preset": "slimllm", **settings})


def logits(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids.to(model.device)).logits.cpu()


def pruned(model: Any, calibration: Calibration, config: PruneConfig, placement: Placement | None = None) -> Pruning:
    """Prune a model in memory, in place, with the engine alone: nothing is written or converted."""
    watch = Stopwatch(model.device)
    run = RunContext(InMemoryModel(model), calibration, config, placement or Placement(), watch)
    dense = run_dense_pass(run)
    curves = None if config.allocation.needs is None else dense.curves()
    pruning = Pruning(run, dense, allocate(dense.similarity, layer_shapes(run.source, config), config, curves).removals)
    for _ in pruning:
        pass
    return pruning


@contextmanager
def logged() -> Iterator[list[str]]:
    """Collect the messages that the package logs inside the `with` block."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger, level = logging.getLogger("slimllm"), logging.getLogger("slimllm").level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield told
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.fixture
def told() -> Iterator[list[str]]:
    """Collect the messages that the package logs during a test."""
    with logged() as sentences:
        yield sentences


def part_of(event: Progress) -> tuple[str, int]:
    """Return the stage of an event, and the index of the part that is complete."""
    stages = {LayerMeasured: "dense", LayerPruned: "prune", StepTrained: "train", PartWritten: "export"}
    return stages[type(event)], event.done - 1


def stop_at(stage: str, index: int) -> ProgressCallback:
    """Return a progress callback that interrupts a run after one of its parts."""

    def progress(event: Progress) -> None:
        if part_of(event) == (stage, index):
            raise KeyboardInterrupt

    return progress


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove everything that a test registers after the test."""
    for registry in (CRITERIA, RECOVERIES, ALLOCATIONS, EXPORTERS):
        monkeypatch.setattr(registry, "_found", dict(registry.all()))
    yield
    for name in [name for name in sys.modules if name.startswith("slimllm_plugin_")]:
        del sys.modules[name]


def contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of every file of a result except the report, which contains times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "report.json"
    }


@pytest.fixture(scope="module", name="pruned")
def _pruned_by_half(token_ids: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model on disk, with half of its layers' parameters; for the tests of training."""
    out = tmp_path_factory.mktemp("pruned") / "half"
    prune(STORIES, out, config(token_ids, ratio=0.5))
    return out


@pytest.fixture(scope="module", name="text")
def _text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 40,000 characters."""
    path = tmp_path_factory.mktemp("text") / "war.txt"
    path.write_text(bundled_text("calibration")[:40_000])
    return path
