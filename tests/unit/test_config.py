from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

import pytest
import torch

from slimllm import InputError, PruneConfig
from slimllm.cli.settings import help_of
from slimllm.methods.allocation.layer_importance import LayerImportance
from slimllm.methods.criteria.slimllm import SlimLLM
from slimllm.methods.recovery.lstsq import LeastSquares
from slimllm.plugins import Method


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        ({"ratio": 0}, InputError, "between 0 and 1, got 0"),
        ({"ratio": float("nan")}, InputError, "ratio"),
        ({"ratio": "0.2"}, TypeError, "ratio must be a number"),
        ({"ratio": True}, TypeError, "ratio must be a number"),
        ({"preset": "quick"}, InputError, "one of best, slimllm, paper"),
        ({"head_unit": "head"}, InputError, "one of kv-group, query"),
        ({"recovery": "lora"}, InputError, "one of affine, bias, lstsq, none"),
        ({"recovery": 3}, TypeError, "recovery must be a name or a registered recovery such as Affine"),
        ({"recovery": LayerImportance()}, TypeError, "recovery must be a name or a registered recovery such as Affine"),
        ({"recovery": LeastSquares}, TypeError, "recovery must be a name or a registered recovery"),
        ({"preset": "paper", "allocation": LayerImportance(alpha=5)}, InputError, "give published=True"),
        ({"preset": "paper", "allocation": "uniform"}, InputError, "allocation Uniform\(\) is not the paper's"),
        ({"dtype": "int8"}, InputError, "dtype must be one of"),
        ({"samples": 0}, InputError, "samples must be at least 1"),
        ({"samples": 2.5}, TypeError, "samples must be an integer"),
        ({"seq_len": 1}, InputError, "seq_len must be at least 2"),
        ({"batch_size": 0}, InputError, "batch_size"),
        ({"seed": 2**70}, InputError, "seed must be below"),
        ({"round_to": 0}, InputError, "round_to"),
        ({"calibration": 5}, TypeError, "calibration must be"),
        ({"device": "gpu"}, InputError, "device must be"),
    ],
)
def test_every_setting_is_checked(settings: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        PruneConfig(**{"ratio": 0.2, **settings})


@pytest.mark.parametrize(
    ("method", "options", "error", "sentence"),
    [
        (LayerImportance, {"alpha": -1.0}, InputError, "layer-importance.alpha must be at least 0"),
        (LayerImportance, {"alpha": float("inf")}, InputError, "layer-importance.alpha must be a finite number"),
        (LayerImportance, {"alpha": "5"}, TypeError, "layer-importance.alpha must be a number or None, got '5'"),
        (LayerImportance, {"pruned_layers": 0}, InputError, "pruned_layers must be at least 1"),
        (LayerImportance, {"pruned_layers": 2.5}, TypeError, "pruned_layers must be an integer or None"),
        (
            LayerImportance,
            {"layers": 2},
            TypeError,
            "has no option layers; its options are pruned_layers, alpha, published",
        ),
        (SlimLLM, {"keep_lowest": 1.0}, InputError, "from 0 to below 1"),
        (SlimLLM, {"keep_lowest": float("nan")}, InputError, "keep_lowest must be a finite number"),
        (LeastSquares, {"ridge": 1.0}, TypeError, "lstsq has no option ridge; its options are precision"),
        (LeastSquares, {"precision": "half"}, InputError, "lstsq.precision must be auto, double or single, got .half."),
    ],
)
def test_every_option_of_a_method_is_checked(
    method: type[Method], options: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        method(**options)


def test_a_name_is_the_method_with_the_options_of_the_preset() -> None:
    assert PruneConfig(0.2, "slimllm").criterion == SlimLLM() != SlimLLM(keep_lowest=0.5)
    paper = PruneConfig(0.2, preset="paper", criterion="slimllm")
    assert (paper.criterion, paper.round_to) == (SlimLLM(keep_lowest=0.01), 1)
    assert (
        repr(paper.criterion) == "SlimLLM(keep_lowest=0.01)" and repr(PruneConfig(0.2, "slimllm").criterion) == "SlimLLM()"
    )
    assert paper.with_preset("best", ratio=0.3) == PruneConfig(0.3)


def test_settings_as_json() -> None:
    settings = PruneConfig(ratio=0.2, calibration=torch.zeros(3, 4, dtype=torch.int64)).to_dict()
    assert json.loads(json.dumps(settings))["calibration"] == "token ids (3, 4)"


def test_every_option_has_help_whatever_the_indentation_of_docstrings() -> None:
    class Dedented:  # as the compiler of Python 3.13 stores it
        __doc__ = inspect.cleandoc(PruneConfig.__doc__ or "")

    fields = {field.name for field in dataclasses.fields(PruneConfig)}
    assert set(help_of(PruneConfig)) == fields and help_of(Dedented) == help_of(PruneConfig)
