"""The keys of report.json, which are written in one place and checked in another."""

from __future__ import annotations

from pathlib import Path

import slimllm
from slimllm.models.families import FAMILIES
from slimllm.pruning.layer_report import LAYER_SHAPE, LayerReport

ROOT = Path(slimllm.__file__).parents[1]


def test_a_layer_is_checked_for_the_keys_that_it_has() -> None:
    """`elapsed_s` and `peak_host_gib` are only shown; what reports of earlier versions lack is optional."""
    assert {name.rstrip("?") for name in LAYER_SHAPE} == set(LayerReport.__annotations__) - {"elapsed_s", "peak_host_gib"}
    always = {name for name in LAYER_SHAPE if not name.endswith("?")}
    assert always <= LayerReport.__required_keys__
    assert (slimllm.PruneReport.__dataclass_fields__["layers"].type) == "list[LayerReport]"


def test_the_readme_names_every_family() -> None:
    names = {name for name in FAMILIES if not name.startswith("slim_")}
    for page in (ROOT / "README.md", ROOT / "docs" / "getting-started.md"):
        missing = [name for name in names if f"`{name}`" not in page.read_text(encoding="utf-8")]
        assert not missing, page
