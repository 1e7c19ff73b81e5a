"""The tokenizer in a model's folder, loaded without running code that is not trusted."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from slimllm.checkpoints.companions import check_regular_files
from slimllm.checkpoints.foreign_json import MOST_OF_SETTINGS, check_shape, find_object, read_object
from slimllm.errors import InputError, first_line

_SETTINGS = {
    "model_max_length?": float,
    "tokenizer_class?": str,
    "chat_template?": (str, list, dict),
    "added_tokens_decoder?": dict,
    "add_bos_token?": bool,
    "add_eos_token?": bool,
    "model_input_names?": [str],
    **{f"{name}_token?": (str, dict) for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")},
}


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder.

    One that comes with Python code is read without it: as transformers' own class of that name, or else from its
    tokenizer.json.

    Raises:
        ValueError: (as InputError) there is none, or it cannot be had without running code that is not trusted.
    """
    check_regular_files(path)
    settings = path / "tokenizer_config.json"
    if settings.is_file():
        content = read_object(settings, MOST_OF_SETTINGS)
        try:
            check_shape(content, _SETTINGS, "")
        except InputError as error:
            raise InputError(f"The tokenizer in {path} cannot be loaded: in {settings.name} {error}") from None
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except BaseException as error:  # whatever a tokenizer library raises, the user's question is "which folder?"
        if not _is_of_the_library(error):
            raise
        met = error
    if not trust_remote_code and (code := tokenizer_code(path)):
        if not (path / "tokenizer.json").is_file():
            raise InputError(
                f"The tokenizer in {path} is Python code ({code}), which is not run; save a fast tokenizer there "
                "(tokenizer.json), or allow the code with --trust-remote-code where the command has it."
            )
        try:
            return PreTrainedTokenizerFast.from_pretrained(path, trust_remote_code=False)
        except BaseException as error:
            if not _is_of_the_library(error):
                raise
            met = error
    raise InputError(
        f"The tokenizer in {path} cannot be loaded; save it in the folder with tokenizer.save_pretrained. "
        f"It said: {first_line(met)}"
    ) from met


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special_tokens: bool = True) -> list[int]:
    """Turn a text into token ids.

    Args:
        tokenizer: The model's tokenizer.
        text: Text of any length.
        special_tokens: Whether those that the tokenizer adds to a text by itself, such as a BOS, are there.

    Raises:
        ValueError: (as InputError) the tokenizer fails, as one does whose vocabulary and merges do not fit together.
    """
    try:
        ids: list[int] = tokenizer(text, verbose=False, add_special_tokens=special_tokens)["input_ids"]
    except BaseException as error:
        if not _is_of_the_library(error):
            raise
        raise InputError(
            f"The tokenizer of {tokenizer.name_or_path} fails on the text ({first_line(error)}); its files do not fit "
            "together."
        ) from error
    return ids


def _is_of_the_library(error: BaseException) -> bool:
    """Whether an error may be one of a tokenizer library: a panic of one that is written in Rust is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def tokenizer_code(path: Path) -> str | None:
    """Name the class of a folder's own code that its tokenizer asks for; None: it asks for none."""
    asked = find_object(path / "tokenizer_config.json", MOST_OF_SETTINGS).get("auto_map") or {}
    asked = asked.get("AutoTokenizer") if isinstance(asked, dict) else asked
    names = asked if isinstance(asked, list) else [asked]
    return next((str(name) for name in reversed(names) if name), None)
