"""What a model's folder holds: what transformers reads, or a sentence, in prune and wherever a model is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import call
from conftest import STORIES, config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import slimllm
from slimllm import InputError
from slimllm.checkpoints.folder import INDEX, SINGLE
from slimllm.checkpoints.opening import open_checkpoint
from slimllm.report import make_sample

Tensors = dict[str, torch.Tensor]
DOWN_PROJ = "model.layers.2.mlp.down_proj.weight"


def copy_of(folder: Path, **settings: object) -> Path:
    shutil.copytree(STORIES, folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


def with_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    copy_of(folder)
    save_file(change(load_file(folder / SINGLE)), folder / SINGLE, metadata={"format": "pt"})
    return folder


def in_shards(folder: Path, tensors: Tensors, index: bool = True) -> None:
    """Write two shards beside what is there."""
    names = sorted(tensors)
    places = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard, metadata={"format": "pt"})
        places |= dict.fromkeys(part, shard)
    if index:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def both_refuse(folder: Path, sentence: str, tmp_path: Path, token_ids: torch.Tensor) -> None:
    """`prune` and `load`, on which every other command is built, say the same kind of sentence."""
    with pytest.raises(InputError, match=sentence):
        slimllm.prune(folder, tmp_path / "out", config(token_ids))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=sentence):
        slimllm.load(folder)


def without_prefix(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


RENAMED: list[tuple[str, str]] = [
    ("_orig_mod.", "names with '_orig_mod.' .* torch.compile"),
    ("module.", "names with 'module.' .* DistributedDataParallel"),
    ("base_model.model.", "names with 'base_model.model.' .* peft"),
    ("language_model.", "Tensors model.embed_tokens.weight and 46 more are missing"),
]


@pytest.mark.parametrize(("prefix", "sentence"), RENAMED)
def test_names_that_another_program_gave(prefix: str, sentence: str, tmp_path: Path, token_ids: torch.Tensor) -> None:
    folder = with_tensors(tmp_path / "m", lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    with pytest.raises(InputError, match=sentence):
        slimllm.prune(folder, tmp_path / "out", config(token_ids))
    if prefix != "language_model.":  # transformers may know what to do with it
        both_refuse(folder, sentence, tmp_path, token_ids)


CHANGED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "missing": (lambda t: {k: v for k, v in t.items() if k != DOWN_PROJ}, rf"Tensor {DOWN_PROJ} is missing"),
    "several missing": (
        lambda t: {k: v for k, v in t.items() if "down_proj" not in k},
        r"Tensors model\.layers\.0\.mlp\.down_proj\.weight and 4 more are missing",
    ),
    "left over": (lambda t: t | {"model.layers.0.self_attn.k_scale": torch.ones(1)}, r"k_scale has no place in the model"),
    "left over outside the layers": (lambda t: t | {"score.weight": torch.ones(2, 64)}, r"score\.weight has no place"),
    "several left over": (
        lambda t: t | {f"mtp.{i}.weight": torch.ones(2) for i in range(3)},
        r"mtp\.0\.weight and 2 more have no place",
    ),
    "GPTQ": (
        lambda t: {k.replace("down_proj.weight", "down_proj.qweight"): v for k, v in t.items()},
        r"quantised .*qweight",
    ),
    "fp8": (
        lambda t: {k: v.to(torch.float8_e4m3fn) if "proj" in k else v for k, v in t.items()},
        "is stored as F8_E4M3; only",
    ),
    "int8": (lambda t: t | {DOWN_PROJ: t[DOWN_PROJ].to(torch.int8)}, f"{DOWN_PROJ} .*is stored as I8; only"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_weights_that_do_not_match(case: str, tmp_path: Path, token_ids: torch.Tensor) -> None:
    change, sentence = CHANGED[case]
    both_refuse(with_tensors(tmp_path / "m", change), sentence, tmp_path, token_ids)


def test_reshaped(tmp_path: Path, token_ids: torch.Tensor) -> None:
    folder = with_tensors(tmp_path / "m", lambda t: t | {DOWN_PROJ: t[DOWN_PROJ][:, :-1].contiguous()})
    with pytest.raises(InputError, match=rf"{DOWN_PROJ} in .* has shape \(64, 171\), but its .* asks for \(64, 172\)"):
        slimllm.prune(folder, tmp_path / "out", config(token_ids))
    with pytest.raises(InputError, match=rf"{DOWN_PROJ} in .* has shape \(64, 171\), but its .* asks for \(64, 172\)"):
        slimllm.load(folder)


MEANINGLESS: dict[str, Callable[[Tensors], Tensors]] = {
    "names of the decoder alone": without_prefix,
    "a stored head equal to the embeddings": lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()},
    "tables of the rotary embedding": lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    "a bias of zero": lambda t: t | {"model.layers.1.self_attn.o_proj.bias": torch.zeros(64)},
}


@pytest.mark.parametrize("case", MEANINGLESS)
def test_what_changes_nothing_is_accepted(case: str, tmp_path: Path, token_ids: torch.Tensor) -> None:
    """The same model, the same bytes."""
    folder = with_tensors(tmp_path / "m", MEANINGLESS[case])
    for name, source in (("a", folder), ("b", STORIES)):
        slimllm.prune(source, tmp_path / name, config(token_ids))
    for shard in (tmp_path / "b").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "a" / shard.name).read_bytes()
    ids = token_ids[:1]
    with torch.no_grad():
        assert torch.equal(
            slimllm.load(folder, device="cpu")[0](ids).logits, slimllm.load(STORIES, device="cpu")[0](ids).logits
        )


def test_the_file_that_transformers_reads(tmp_path: Path, stories: torch.nn.Module) -> None:
    """model.safetensors wins over an index beside it, with shards that are there or not."""
    folder = copy_of(tmp_path / "m")
    wanted = load_file(folder / SINGLE)
    in_shards(folder, {name: torch.randn_like(tensor) for name, tensor in wanted.items()})
    for _ in range(2):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(loaded.model.embed_tokens.weight, wanted["model.embed_tokens.weight"])  # as transformers has it
        checkpoint = open_checkpoint(folder)
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in checkpoint.read(checkpoint.shapes()).items())
        for shard in folder.glob("model-*"):
            shard.unlink()
    (folder / SINGLE).unlink()
    with pytest.raises(InputError, match=r"Shard model-00001-of-00002.safetensors, which .* names, is missing"):
        open_checkpoint(folder)


def test_shards_without_their_index(tmp_path: Path, token_ids: torch.Tensor) -> None:
    folder = copy_of(tmp_path / "m")
    in_shards(folder, load_file(folder / SINGLE), index=False)
    (folder / SINGLE).unlink()
    both_refuse(folder, "but model-00001-of-00002.safetensors: its shards have lost their index", tmp_path, token_ids)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("consolidated.safetensors", "but consolidated.safetensors: it is in the format of the model's authors"),
        ("model.fp16.safetensors", r"but model.fp16.safetensors, which transformers does not read .* rename it"),
        ("pytorch_model.bin", "but pytorch_model.bin: pickled files are never read"),
        ("model-Q8_0.gguf", "but model-Q8_0.gguf: give that file"),
        ("", r"holds no weights \(model.safetensors, or shards with model.safetensors.index.json\)\."),
    ],
)
def test_other_files_than_weights(name: str, sentence: str, tmp_path: Path, token_ids: torch.Tensor) -> None:
    folder = copy_of(tmp_path / "m")
    if name:
        (folder / SINGLE).rename(folder / name)
    else:
        (folder / SINGLE).unlink()
    both_refuse(folder, sentence, tmp_path, token_ids)


@pytest.mark.parametrize("with_model", [False, True])
def test_an_adapter(with_model: bool, tmp_path: Path, token_ids: torch.Tensor) -> None:
    """transformers would load another model, which the adapter names, in place of what lies beside it."""
    folder = copy_of(tmp_path / "m") if with_model else tmp_path / "m"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    both_refuse(folder, "is an adapter of peft, not a model; merge it", tmp_path, token_ids)


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("", {"quantization_config": {"quant_method": "awq"}}),
        ("", {"compression_config": {"format": "pack-quantized"}}),
        ("", {"text_config": {"quantization_config": {"quant_method": "fp8"}}}),
        ("quantize_config.json", {}),
        ("hf_quant_config.json", {}),
    ],
)
def test_quantised_by_its_settings(file: str, settings: dict[str, object], tmp_path: Path, token_ids: torch.Tensor) -> None:
    folder = copy_of(tmp_path / "m", **settings)
    if file:
        (folder / file).write_text("{}")
    with pytest.raises(InputError, match=r"holds \w+ weights; prune the unquantised model"):
        slimllm.prune(folder, tmp_path / "out", config(token_ids))


def test_a_padding_token_outside_the_vocabulary(tmp_path: Path, token_ids: torch.Tensor) -> None:
    sentence = "pad_token_id in .* is 512, but the vocabulary has the tokens 0 to 511"
    both_refuse(copy_of(tmp_path / "m", pad_token_id=512), sentence, tmp_path, token_ids)
    slimllm.prune(copy_of(tmp_path / "n", pad_token_id=-1), tmp_path / "out", config(token_ids))


def test_settings_of_another_weight_file_or_of_foreign_kernels(tmp_path: Path, token_ids: torch.Tensor) -> None:
    weights = copy_of(tmp_path / "a", transformers_weights="other.safetensors")
    both_refuse(weights, "asks for weights in 'other.safetensors'", tmp_path, token_ids)
    kernels = copy_of(tmp_path / "b", attn_implementation="someone/kernel")
    both_refuse(kernels, "asks for code from the hub", tmp_path, token_ids)


def test_eval_says_it_and_prints_no_perplexity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With one tensor missing it used to print a number, of random weights, and exit with 0."""
    folder = with_tensors(tmp_path / "m", CHANGED["missing"][0])
    for command in (["eval", folder], ["compare", folder], ["export", folder, "--to", "stock", "--out", tmp_path / "x"]):
        code, out, err = call(capsys, *command)
        assert code == 2 and f"{DOWN_PROJ} is missing" in err and "perplexity" not in out, command


def test_a_revision_of_a_model_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def snapshot_download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        return str(STORIES)

    monkeypatch.setattr("slimllm.checkpoints.opening.snapshot_download", snapshot_download)
    assert open_checkpoint("someone/model@v1.0").name == "someone/model@v1.0" and set(asked) == {("someone/model", "v1.0")}
    slimllm.load("someone/model@main")
    assert asked[-1] == ("someone/model", "main")


def test_a_model_in_memory_of_two_dtypes(stories: torch.nn.Module, token_ids: torch.Tensor) -> None:
    stories.half()
    stories.model.norm.float()
    with pytest.raises(InputError, match="parameters in float16 and float32"):
        slimllm.prune_model(stories, token_ids, slimllm.PruneConfig(0.2, "slimllm"))


def test_causal_masks_of_old_checkpoints(tmp_path: Path) -> None:
    """They follow from the architecture: transformers leaves them out, and so does eval."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=512, n_positions=32))
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STORIES / name, tmp_path / name)
    tensors = load_file(tmp_path / SINGLE)
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril().bool() for i in range(2)}
    masks |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    save_file(tensors | masks, tmp_path / SINGLE, metadata={"format": "pt"})
    loaded, _ = slimllm.load(tmp_path, device="cpu")
    assert torch.equal(loaded.transformer.wte.weight, model.transformer.wte.weight)
    save_file(tensors | {"transformer.h.0.attn.extra.bias": torch.ones(16)}, tmp_path / SINGLE, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"attn\.extra\.bias has no place"):
        slimllm.load(tmp_path)


def test_a_file_of_another_program_does_not_switch_the_checks_off(tmp_path: Path) -> None:
    """transformers goes by config.json alone."""
    folder = with_tensors(tmp_path / "m", CHANGED["left over"][0])
    (folder / "quantize_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"k_scale has no place"):
        slimllm.load(folder)


def test_a_compiled_decoder(tmp_path: Path, token_ids: torch.Tensor) -> None:
    folder = with_tensors(
        tmp_path / "m", lambda tensors: {n.replace("model.", "model._orig_mod.", 1): t for n, t in tensors.items()}
    )
    both_refuse(folder, "names with '_orig_mod.'", tmp_path, token_ids)


@pytest.mark.parametrize(
    "settings", [{"_attn_implementation_internal": "x/y"}, {"a": {"b": {"attn_implementation": "x/y"}}}]
)
def test_kernels_of_the_hub_in_any_entry(settings: dict[str, object], tmp_path: Path, token_ids: torch.Tensor) -> None:
    both_refuse(copy_of(tmp_path / "m", **settings), "asks for code from the hub", tmp_path, token_ids)


def test_settings_too_deep_to_be_read(tmp_path: Path, token_ids: torch.Tensor) -> None:
    folder = copy_of(tmp_path / "m")
    (folder / "config.json").write_text("[" * 100_000)
    both_refuse(folder, "nested too deeply", tmp_path, token_ids)


def test_a_stored_head_that_differs_is_not_tied(tmp_path: Path, token_ids: torch.Tensor) -> None:
    """Whatever the settings say, in prune as in eval."""
    folder = with_tensors(tmp_path / "m", lambda t: t | {"lm_head.weight": 2 * t["model.embed_tokens.weight"]})
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    with torch.no_grad():
        twice, once = (slimllm.load(one, device="cpu")[0](token_ids[:1]).logits for one in (folder, STORIES))
    assert torch.allclose(twice, 2 * once, rtol=1e-5, atol=1e-5)
    assert slimllm.prune(folder, tmp_path / "out", config(token_ids)).calibration["perplexity_dense"] == pytest.approx(
        slimllm.perplexity(slimllm.load(folder, device="cpu")[0], token_ids[:4].flatten(), seq_len=64), rel=1e-4
    )


def test_outputs_that_are_not_numbers(stories: torch.nn.Module, token_ids: torch.Tensor) -> None:
    stories.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="outputs are NaN when computed in float32"):
        slimllm.perplexity(stories, token_ids.flatten(), seq_len=64)


def test_generation_settings_of_the_model_do_not_matter(tmp_path: Path, token_ids: torch.Tensor) -> None:
    """Contrastive search is code of the hub by now; the sample on the page is greedy, whatever the model asks for."""
    folder = copy_of(tmp_path / "m")
    plain = make_sample(STORIES).pruned
    (folder / "generation_config.json").write_text(json.dumps({"penalty_alpha": 0.6, "top_k": 4, "num_beams": 2}))
    assert make_sample(folder).pruned == plain and plain


def test_a_pointer_of_git_lfs(tmp_path: Path, token_ids: torch.Tensor) -> None:
    folder = copy_of(tmp_path / "m")
    (folder / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    both_refuse(folder, "is a Git LFS pointer, not the file itself; run git lfs pull", tmp_path, token_ids)
