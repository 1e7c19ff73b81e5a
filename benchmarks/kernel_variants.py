"""All launch variants of the shipped kernels, as the compiler sees them: types, constants, options."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from slimllm.kernels import columns, cosine, elimination, exchange, gram, gram_configs, pearson

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Variant:
    """Launch of a kernel: the types of its arguments, its constants and its options."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: str | None = None  # instruction required on sm_90: HGMMA, or HMMA if HGMMA is impossible
    aligned: tuple[str, ...] = ()  # integers that are multiples of 16, as real widths are


def _integers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


def variants(arch: int) -> list[Variant]:
    """List all variants for one architecture."""
    return [*_gram(arch), *_gram_reduce(), *_pearson(), *_exchange(), *_elimination(), *_cosine(), *_columns()]


def _gram(arch: int) -> list[Variant]:
    found = []
    layouts = ("", "unaligned", "unaligned result", "transposed")
    launches = (*layouts, "pivot", "weight", "pivot weight", "pivot weight unaligned", "tma")
    for dtype, torch_dtype in DTYPES.items():
        for launch in launches:
            for split in ("", "partial"):
                tma, parts = launch == "tma", "pivot" in launch or "weight" in launch
                if tma and (arch // 10 not in gram_configs.TMA_MAJORS or dtype == "fp32"):
                    continue
                aligned_rows = "unaligned" not in launch and launch != "transposed"
                config = gram_configs.config_of(
                    gram_configs.kind_of(torch_dtype, parts, tma, aligned_rows), divmod(arch, 10)
                )
                tile = f"[{config.block_n}, {config.block_f}]"
                types = {"x": f"tensordesc<{dtype}{tile}>" if tma else f"*{dtype}", "tiles": "*i32", "gram": "*fp32"}
                types |= {"total": "*fp64", **_integers("num_tokens", "features", "split_tokens", "stride_row")}
                constants: dict[str, Any] = {"BLOCK_N": config.block_n, "BLOCK_F": config.block_f, "TMA": tma}
                constants |= {"stride_col": 1, "stride_total": 1}
                unit, other = ("stride_n", "stride_f") if launch == "transposed" else ("stride_f", "stride_n")
                types, constants = types | _integers(other), constants | {unit: 1}
                for name in ("pivot", "weight"):
                    types |= {name: "*fp32"} if name in launch else {}
                    constants |= {} if name in launch else {name: None}
                for name in ("partial", "partial_sums"):
                    types |= {name: "*fp32"} if split else {}
                    constants |= {} if split else {name: None}
                aligned: tuple[str, ...] = ("features", "split_tokens", "stride_row", other)
                if "unaligned" in launch:
                    aligned = ("split_tokens", other) if launch == "unaligned result" else ("split_tokens",)
                name = " ".join(["gram", dtype, launch or "plain", split]).strip()
                options = config.num_warps, config.num_stages, "HGMMA", aligned
                found.append(Variant(name, gram.gram_kernel, types, constants, *options))
    return found


def _gram_reduce() -> list[Variant]:
    types = {"tiles": "*i32", "gram": "*fp32", "total": "*fp64", "partial": "*fp32", "partial_sums": "*fp32"}
    types |= _integers("features", "num_slots", "stride_row")
    found = []
    for block in sorted({config.block_f for config in gram_configs.CONFIGS.values()}):
        constants = {"stride_col": 1, "stride_total": 1, "BLOCK_F": block, "ROWS": gram.REDUCE_ROWS}
        found.append(Variant(f"gram reduce {block}", gram.reduce_kernel, types, constants, aligned=("stride_row",)))
    return found


def _pearson() -> list[Variant]:
    found = []
    stream = pearson.STREAM_CONFIG
    aligned: tuple[str, ...]
    for weight, torch_dtype in DTYPES.items():
        for covariance in ("fp32", "fp64"):
            for launch in ("", "unaligned"):
                blocks = pearson.choose_config(torch_dtype, aligned=not launch)
                types = {
                    "weight": f"*{weight}",
                    "covariance": f"*{covariance}",
                    "pairs": "*i32",
                    "result": f"*{covariance}",
                }
                types |= _integers("out_features", "width", "stride_wk", "stride_row", "stride_i", "stride_j")
                constants = {"BLOCK_K": blocks.block_k, "BLOCK_A": blocks.block_a, "BLOCK_B": blocks.block_b}
                constants |= {"stride_wf": 1, "stride_col": 1}
                name = f"pearson gram-blocks {weight} {covariance} {launch}".strip()
                aligned = () if launch else ("out_features", "width", "stride_wk", "stride_row", "stride_i", "stride_j")
                options = blocks.num_warps, blocks.num_stages, "HGMMA", aligned
                found.append(Variant(name, pearson.gram_blocks_kernel, types, constants, *options))
    aligned = ("out_features", "width", "stride_wk", "stride_i", "stride_j", "stride_n")
    for dtype, launch in product(DTYPES, ("", "unaligned")):
        types = {"x": f"*{dtype}", "mean": "*fp32", "weight": f"*{dtype}", "pairs": "*i32", "result": "*fp32"}
        types |= _integers(
            "num_tokens", "num_heads", "out_features", "width", "stride_n", "stride_wk", "stride_i", "stride_j"
        )
        constants = {"BLOCK_K": stream.block_k, "BLOCK_H": stream.block_h, "BLOCK_N": stream.block_n}
        constants |= {"BLOCK_D": stream.block_d, "stride_f": 1, "stride_wf": 1}
        # These products are batched over heads or outputs, which wgmma does not support.
        options = stream.num_warps, stream.num_stages, "HMMA", () if launch else aligned
        found.append(Variant(f"pearson stream {dtype} {launch}".strip(), pearson.stream_kernel, types, constants, *options))
    return found


def _exchange() -> list[Variant]:
    found = []
    doubles = ("own", "with_full", "with_kept", "cov_kept", "variance", "full_variance", "scores", "best")
    for dtype in ("fp32", "fp64"):
        types = {"covariance": f"*{dtype}", "kept": "*u8", "pruned": "*i64", **dict.fromkeys(doubles, "*fp64")}
        types |= _integers("step", "features", "num_heads", "group_size", "stride_i", "stride_j") | {"rounding": "fp32"}
        options = exchange.NUM_WARPS, 3, None, ("features", "stride_i", "stride_j")
        for name, kernel in (
            ("sums", exchange.sums_kernel),
            ("score", exchange.score_kernel),
            ("update", exchange.exchange_kernel),
        ):
            constants = {"BLOCK": exchange.BLOCK} | ({"HEADS": 64} if name == "update" else {})
            found.append(Variant(f"exchange {name} {dtype}", kernel, types, constants, *options))
    return found


def _elimination() -> list[Variant]:
    types = dict.fromkeys(("inverse", "products", "rows", "parts", "shifts", "costs"), "*fp64") | {"chosen": "*i64"}
    types |= _integers("candidates", "num") | {"least": "fp32"}
    found = []
    for candidates in (16, 256):
        constants = {"CANDIDATES": candidates, "STEPS": elimination.STEPS}
        name = f"elimination {candidates}"
        found.append(Variant(name, elimination.elimination_kernel, types, constants, elimination.NUM_WARPS))
    return found


def _cosine() -> list[Variant]:
    found = []
    for dtype, launch in product(DTYPES, ("", "unaligned")):
        types = {"a": f"*{dtype}", "b": f"*{dtype}", "result": "*fp32"}
        types |= _integers("num_tokens", "features", "stride_an", "stride_bn")
        constants = {"BLOCK_N": cosine.BLOCK_N, "BLOCK_F": cosine.BLOCK_F, "stride_af": 1, "stride_bf": 1}
        aligned = () if launch else ("features", "stride_an", "stride_bn")
        name = f"cosine {dtype} {launch}".strip()
        found.append(Variant(name, cosine.cosine_kernel, types, constants, cosine.NUM_WARPS, aligned=aligned))
    return found


def _columns() -> list[Variant]:
    found = []
    for dtype, launch, layout in product(
        DTYPES, ("sums", "sums pivot", "sums pivot weight", "products", "products weight"), ("", "unaligned", "transposed")
    ):
        if "weight" in launch and layout:
            continue  # the loads are those without weights
        types = {"x": f"*{dtype}", "partial": "*fp32", **_integers("num_tokens", "features", "split_tokens")}
        constants: dict[str, Any] = {"BLOCK_N": columns.BLOCK_N, "BLOCK_F": columns.BLOCK_F}
        for name in ("x", "y"):
            there = name == "x" or launch.startswith("products")
            unit, other = ("n", "f") if layout == "transposed" else ("f", "n")
            if there:
                types, constants = types | _integers(f"stride_{name}{other}"), constants | {f"stride_{name}{unit}": 1}
            else:
                types |= _integers(f"stride_{name}{unit}", f"stride_{name}{other}")
        types |= {"y": f"*{dtype}"} if launch.startswith("products") else {}
        constants |= {} if launch.startswith("products") else {"y": None}
        pivots = ("pivot_x", launch != "sums"), ("pivot_y", launch.startswith("products"))
        for name, wanted in (*pivots, ("weight", "weight" in launch)):
            types |= {name: "*fp32"} if wanted else {}
            constants |= {} if wanted else {name: None}
        strides = tuple(argument for argument in types if argument.startswith("stride"))
        aligned = () if layout == "unaligned" else ("features", "split_tokens", *strides)
        name = " ".join(f"columns {launch} {dtype} {layout}".split())
        found.append(Variant(name, columns.columns_kernel, types, constants, columns.NUM_WARPS, aligned=aligned))
    return found
