"""Settings of a pruning run, in one frozen, validated object."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimllm.checks import DTYPES, check_choice, check_number, parse_bytes, parse_device
from slimllm.errors import InputError
from slimllm.plugins import ALLOCATIONS, CRITERIA, RECOVERIES
from slimllm.presets import DEFAULT, PRESETS

if TYPE_CHECKING:  # where it is needed it is imported: wrong settings are refused before that
    import torch

# The settings that are methods, and the registries that find them by name.
METHODS = {"criterion": CRITERIA, "allocation": ALLOCATIONS, "recovery": RECOVERIES}
HEAD_UNITS = ("kv-group", "query")
TOKEN_WEIGHTS = ("none", "norm")
BOS_CHOICES = ("auto", "always", "never")
BIAS_CHOICES = ("auto", "yes", "no")
PROGRAMS = ("transformers", "vllm", "llama.cpp")


@dataclass(frozen=True, repr=False)
class PruneConfig:
    """Settings of one pruning run.

    Attributes:
        ratio: Fraction of the decoder layers' parameters to remove, in (0, 1).
        preset: Values of settings that are not given: `best` (the most accurate), `slimllm` (the paper's method: faster,
            less memory) or `paper` (as published values). It decides the next four settings, and `round_to`, if they are
            None. `best`: `obs` with `auto`, `lstsq` and `norm`. `slimllm`: the SlimLLM method (`slimllm` with `layer-
            importance`, `affine` and `none`) with an exact target, clamped ratios and rounded widths; faster, with less
            memory. `paper`: the published r, n and alpha (the target is then r * n / num_layers, which the report states),
            round(r_l * H) heads and round(r_l * I) channels, and the published implementation's rule that always keeps the
            lowest 1 % of channels. With grouped queries, which the paper does not cover, channels compensate for the
            rounding to whole groups.
        criterion: Which units are removed, by default the preset's choice: `slimllm` (the paper's), `obs` (lowest output
            error after refit), `wanda-sp`, `flap`, `magnitude` or `random`. Or a `slimllm.methods.criteria.Criterion`,
            which the attribute always is.
        allocation: How much each layer loses, by default the preset's choice: `layer-importance` (the paper's softmax),
            `uniform`, `auto` (by measured error) or `flap`. `auto` removes where `obs` measures the least error per
            parameter, weighted by output sensitivity. `flap` uses one threshold for the FLAP paper's scores, standardised
            in every sub-layer. Or a `slimllm.methods.allocation.Allocation`, which the attribute always is.
        recovery: How the rest makes up for what is removed, by default the preset's choice: `affine` (the paper's), `lstsq`
            (all kept weights by least squares), `bias` or `none`. `affine` regresses every dense output dimension on the
            pruned one; `lstsq` regresses the removed output on all kept columns, with a ridge; `bias` adds the mean of the
            removed output, as in FLAP. Or a `slimllm.methods.recovery.Recovery`, which the attribute always is.
        token_weights: Weights of tokens in all statistics: `none` (all equal, as published) or `norm` (by what the next
            norm divides them by). With `norm` the weight is 1 / mean square of the residual stream after the sub-layer.
            Errors then count as the rest of the model sees them, and the few very large tokens of large models do not
            dominate the statistics.
        head_unit: Unit removed from attention: `kv-group` (a KV head with all its query heads) or `query` (the same number
            of query heads from every group). Both are a single head if the group size is 1.
        calibration: A file (text, JSON lines, CSV, .gz) or a dataset NAME[:CONFIG[:SPLIT[:COLUMN]]], or several that share
            the windows, NAME:0.7 and NAME:0.3; the default is `bundled`, a text of the package. Without numbers
            the shares are equal. Parts of a long file are drawn by `seed`, see `slimllm.calibration.read_texts`; the preset
            `paper` draws its windows from the whole file. A folder of data files is a dataset, too. Or token ids (samples,
            seq_len) int64, which then are the windows: `bos`, `samples`, `seq_len` and `seed` do not apply.
        bos: BOS before every calibration window: `auto` (if the tokenizer adds one to a text), `always` or `never`. The
            preset `paper` treats `auto` as `never`, as published.
        samples: Number of calibration windows; the default is 32, and more for wide layers with `lstsq`, `obs` or `auto`.
            They fit the channels of an FFN and get two tokens for each, as far as the text goes; the report has the number.
        seq_len: Tokens per window, the BOS included.
        seed: Seed of the draw of the windows, and of the criterion random. Nothing else in a run is random.
        batch_size: Windows in a forward pass; the default is about 1024 tokens.
        heads_multiple_of: Keep a multiple of this many KV heads in every layer, to split them over as many GPUs. With
            `head_unit` `query` this applies to the kept query heads. The model's own number must be a multiple. The default
            of `round_to` becomes a multiple of it, too. Not with the preset `paper`, which uses the published numbers of
            heads.
        round_to: FFN widths are multiples of this; the default is the largest power of two up to 64 that the target allows.
            A step is allowed if the error that remains, half a step, is within 0.5 % of the target. The preset `paper`
            uses 1.
        dtype: dtype of the written weights, float32, float16 or bfloat16; the default is the checkpoint's own. For a
            quantised GGUF file the default is bfloat16.
        compute_dtype: dtype of the forward passes; the default is float32 on a CPU and the checkpoint's own on a GPU.
        device: cpu, cuda, cuda:1, …; the default is a GPU if there is one.
        host_memory, gpu_memory: Memory budget, such as 16GiB: slimllm chooses the cheapest offloading that fits it.
        bias: Whether recoveries may add a bias to an output projection that has none: `yes`, `no`, or `auto` (unless
            `program` has no place for it). Without it `lstsq` is a regression through the origin, and `obs`, `auto` and
            `flap` measure by second moments instead of covariances. `affine` and `bias` need it: nothing else of theirs
            replaces a mean.
        program: The program that must load the result without code of slimllm's: `transformers`, `vllm` or `llama.cpp`. It
            decides, by the model's family, whether all layers lose the same, `bias`, numbers of heads and the default of
            `round_to`, and `lstsq` replaces the preset's recovery if that needs a bias. What cannot be met is refused
            before any weight is read. On the command line: --for.

    Raises:
        ValueError: (as InputError) a value is out of range; the message says which and what to give.
        TypeError: a value has the wrong type.
    """

    ratio: float
    preset: str = DEFAULT
    criterion: Any = None
    allocation: Any = None
    recovery: Any = None
    token_weights: str | None = None
    head_unit: str = "kv-group"
    calibration: str | Path | Sequence[str | Path] | torch.Tensor | None = None
    bos: str = "auto"
    samples: int | None = None
    seq_len: int = 128
    seed: int = 0
    batch_size: int | None = None
    heads_multiple_of: int = 1
    round_to: int | None = None
    dtype: str | None = None
    compute_dtype: str | None = None
    device: str | None = None
    host_memory: str | None = None
    gpu_memory: str | None = None
    bias: str = "auto"
    program: str | None = None

    def __post_init__(self) -> None:
        check_number("ratio", self.ratio, (int, float))
        if not 0 < self.ratio < 1:
            raise InputError(
                f"ratio is the fraction of the layers' parameters to remove and must lie between 0 and 1, "
                f"got {self.ratio} (30 % is 0.3)."
            )
        check_choice("preset", self.preset, tuple(PRESETS))
        row = PRESETS[self.preset]
        for name in ("criterion", "allocation", "recovery", "token_weights", "round_to"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, row[name])
        check_choice("head_unit", self.head_unit, HEAD_UNITS)
        check_choice("token_weights", self.token_weights, TOKEN_WEIGHTS)
        check_choice("bos", self.bos, BOS_CHOICES)
        check_choice("bias", self.bias, BIAS_CHOICES)
        if self.program is not None:
            check_choice("program", self.program, PROGRAMS)
        for name in ("dtype", "compute_dtype"):
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), DTYPES)
        for name, least in (("seq_len", 2), ("seed", 0), ("heads_multiple_of", 1)):
            check_number(name, getattr(self, name), int, least)
        if self.seed >= 2**63:
            raise InputError(f"seed must be below 2 to the power of 63, got {self.seed}.")
        for name in ("samples", "batch_size", "round_to"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), int, 1)
        self._check_calibration()
        if self.device is not None:
            parse_device(self.device)
        for name in ("host_memory", "gpu_memory"):
            parse_bytes(name, getattr(self, name))
        self._make_methods(row["settings"])

    def _check_calibration(self) -> None:
        given: Any = self.calibration
        if given is None or self.token_ids is not None:
            return
        texts = tuple(given) if isinstance(given, (list, tuple)) else (given,)
        for text in texts:
            if not isinstance(text, (str, Path)):
                raise TypeError(
                    "calibration must be a path, the name of a dataset, several of these or a tensor of token ids, "
                    f"got {type(text).__name__}."
                )
        if not texts:
            raise InputError("calibration is an empty list; give a text, or leave it out for the bundled one.")
        object.__setattr__(self, "calibration", texts if len(texts) > 1 else texts[0])

    def _make_methods(self, settings: dict[tuple[str, str], dict[str, Any]]) -> None:
        """Make methods of their names, with the preset's settings by kind and name, and check that they go together."""
        for kind, registry in METHODS.items():
            given = getattr(self, kind)
            of_preset = settings.get((kind, given)) if isinstance(given, str) else None
            object.__setattr__(self, kind, registry.make(given, of_preset))
        self.allocation.check(self.heads_multiple_of)
        if self.preset == "paper" and (
            self.allocation.name != "layer-importance" or not self.allocation.settings.published
        ):
            raise InputError(
                f"allocation {self.allocation!r} is not the paper's; leave it out, or choose another preset (for "
                "layer-importance, give published=True; with_preset converts settings that were made for another preset)."
            )
        for method in (self.criterion, self.recovery):
            if method.dense_statistics and (method.attention_gram or _names(method.needs) != ["COLUMNS"]):
                raise InputError(
                    f"{method.name} has dense_statistics, so it must have attention_gram = False and needs = Needs.COLUMNS."
                )
        if self.criterion.needs_recovery and not self.recovery.adds_bias:
            what = f"criterion {self.criterion.name} removes what a recovery can make up for"
            these = "lstsq" if self.bias == "no" else "lstsq, affine or bias"
            raise InputError(f"{what}; give the recovery {these}, or another criterion (or the preset slimllm).")
        if self.bias == "no" and self.recovery.adds_bias and not self.recovery.goes_without_bias:
            these = "lstsq" if self.criterion.needs_recovery else "lstsq or none"
            raise InputError(f"recovery {self.recovery.name} works by its bias; with bias no give recovery {these}.")

    @property
    def adds_bias(self) -> bool:
        """Whether output projections without a bias get one."""
        return bool(self.recovery.adds_bias and self.bias != "no")

    @property
    def roundings(self) -> tuple[int, ...]:
        """Steps of widths to choose from by default.

        llama.cpp quantises rows of a multiple of 256 or, to larger types, of 32; vLLM's kernels for 8 bits want 16.
        """
        return {"llama.cpp": (256, 128, 64, 32), "vllm": (64, 32, 16)}.get(str(self.program), (64, 32, 16, 8, 4, 2, 1))

    @property
    def token_ids(self) -> torch.Tensor | None:
        """The calibration windows, if they are given as token ids."""
        torch = sys.modules.get("torch")  # without it nobody has a tensor
        return self.calibration if torch and isinstance(self.calibration, torch.Tensor) else None

    @property
    def needs(self) -> Any:
        """Statistics of activations that the criterion and the recovery need: `slimllm.methods.statistics.Needs`."""
        return self.criterion.needs | self.recovery.needs

    @property
    def one_pass(self) -> bool:
        """Whether all statistics are those of the dense model, so that the dense pass is the only one over the windows."""
        return bool(self.criterion.dense_statistics and self.recovery.dense_statistics)

    def __repr__(self) -> str:
        """Return the call that makes these settings, without those that have the preset's or the default value."""
        usual, given = PruneConfig(self.ratio, self.preset), [f"ratio={self.ratio!r}"]
        for name in (one.name for one in dataclasses.fields(self) if one.name != "ratio"):
            value: Any = getattr(self, name)
            if name == "preset":
                given += [f"preset={value!r}"] if value != DEFAULT else []
            elif name == "calibration" and self.token_ids is not None:
                given.append(f"calibration=<token ids {tuple(self.token_ids.shape)}>")
            elif value != getattr(usual, name):
                plain = name in METHODS and not value.is_foreign and value.settings == type(value).Settings()
                given.append(f"{name}={(value.name if plain else str(value) if isinstance(value, Path) else value)!r}")
        return f"PruneConfig({', '.join(given)})"

    def with_preset(self, preset: str, **changes: Any) -> PruneConfig:
        """Return a copy with another preset, which decides again all settings that presets decide, and with changes."""
        decided: dict[str, Any] = dict.fromkeys(("criterion", "allocation", "recovery", "token_weights"))
        decided["round_to"] = None if self.round_to == PRESETS[self.preset]["round_to"] else self.round_to
        return dataclasses.replace(self, **{**decided, "preset": preset, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON types; token ids appear as their shape."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if (token_ids := self.token_ids) is not None:
            settings["calibration"] = f"token ids {tuple(token_ids.shape)}"
        elif isinstance(self.calibration, tuple):
            settings["calibration"] = [str(text) for text in self.calibration]
        elif self.calibration is not None:
            settings["calibration"] = str(self.calibration)
        methods = {kind: getattr(self, kind) for kind in METHODS}
        settings |= {kind: method.name for kind, method in methods.items()}
        settings["method_settings"] = {kind: method.describe() for kind, method in methods.items()}
        settings["method_versions"] = {kind: method.version for kind, method in methods.items()}
        settings["by_sensitivity"] = self.allocation.by_sensitivity
        settings["one_pass"] = self.one_pass
        settings["method_needs"] = {kind: _names(method.needs) for kind, method in methods.items()}
        return settings


def _names(needs: Any) -> list[str]:
    """Return the names of the flags that are set in a method's needs."""
    return [] if needs is None else [flag.name for flag in type(needs) if flag in needs]


def check_config(config: object) -> None:
    """Raise TypeError if settings are not a PruneConfig."""
    if not isinstance(config, PruneConfig):
        raise TypeError(f"config must be a PruneConfig, such as PruneConfig(ratio=0.2), got {type(config).__name__}.")
