from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from slimllm import InputError, PruneConfig


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        ({"ratio": 0}, InputError, "between 0 and 1, got 0"),
        ({"ratio": float("nan")}, InputError, "ratio"),
        ({"ratio": "0.2"}, TypeError, "ratio must be a number"),
        ({"ratio": True}, TypeError, "ratio must be a number"),
        ({"preset": "quick"}, InputError, "one of default, paper, best"),
        ({"head_unit": "head"}, InputError, "one of kv-group, query"),
        ({"recovery": "lora"}, InputError, "one of affine, lstsq, bias, none"),
        ({"recovery": "lstsq", "dense_target": 1.5}, InputError, "dense_target is a share, from 0 to 1, got 1.5"),
        ({"dense_target": 0.5}, InputError, "belongs to the recovery lstsq, not to affine"),
        ({"feature_space": "svd"}, InputError, "one of eigh, function"),
        ({"dtype": "int8"}, InputError, "dtype must be one of"),
        ({"samples": 0}, InputError, "samples must be at least 1"),
        ({"samples": 2.5}, TypeError, "samples must be an integer"),
        ({"seq_len": 1}, InputError, "seq_len must be at least 2"),
        ({"batch_size": 0}, InputError, "batch_size"),
        ({"alpha": -1.0}, InputError, "alpha must be at least 0"),
        ({"alpha": float("inf")}, InputError, "alpha must be a finite number"),
        ({"seed": 2**70}, InputError, "seed must be below"),
        ({"keep_lowest": 1.0}, InputError, "below 1"),
        ({"round_to": 0}, InputError, "round_to"),
        ({"calibration": 5}, TypeError, "calibration must be"),
        ({"device": "gpu"}, InputError, "device must be"),
    ],
)
def test_every_setting_is_checked(settings: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        PruneConfig(**{"ratio": 0.2, **settings})


def test_settings_as_json() -> None:
    settings = PruneConfig(ratio=0.2, calibration=torch.zeros(3, 4, dtype=torch.int64)).to_dict()
    assert json.loads(json.dumps(settings))["calibration"] == "token ids (3, 4)"
