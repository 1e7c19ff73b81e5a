"""The presets: values of the settings that are not given."""

from __future__ import annotations

from typing import Any

DEFAULT = "best"
# Values that a preset gives to settings that are not given; `settings` are options of methods, by kind and name. The preset
# `paper` also puts no BOS before the windows, unless asked to, and draws them from the whole file.
PRESETS: dict[str, dict[str, Any]] = {
    "best": {
        "criterion": "obs",
        "allocation": "auto",
        "recovery": "lstsq",
        "token_weights": "norm",
        "round_to": None,
        "settings": {},
    },
    "slimllm": {
        "criterion": "slimllm",
        "allocation": "layer-importance",
        "recovery": "affine",
        "token_weights": "none",
        "round_to": None,
        "settings": {},
    },
    "paper": {
        "criterion": "slimllm",
        "allocation": "layer-importance",
        "recovery": "affine",
        "token_weights": "none",
        "round_to": 1,
        "settings": {
            ("criterion", "slimllm"): {"keep_lowest": 0.01},
            ("allocation", "layer-importance"): {"published": True},
        },
    },
}
