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

    Unless its Python code is trusted, a tokenizer with code is loaded without it: as transformers' own class of that name,
    or else from its tokenizer.json.

    Raises:
        ValueError: (as InputError) there is no tokenizer, or it cannot be loaded without running code that is not trusted.
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
    except BaseException as error:  # any error of a tokenizer library becomes one that names the folder
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
        f"The error was: {first_line(met)}"
    ) from met


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special_tokens: bool = True) -> list[int]:
    """Convert a text to token ids.

    Args:
        tokenizer: The model's tokenizer.
        text: Text of any length.
        special_tokens: Whether to include the tokens that the tokenizer adds to a text by itself, such as a BOS.

    Raises:
        ValueError: (as InputError) the tokenizer fails, for example because its vocabulary and merges do not match.
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
    """Return whether an error may come from a tokenizer library; a panic in Rust code is not an Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def tokenizer_code(path: Path) -> str | None:
    """Return the name of the custom class that a folder's tokenizer asks for; None if it asks for none."""
    asked = find_object(path / "tokenizer_config.json", MOST_OF_SETTINGS).get("auto_map") or {}
    asked = asked.get("AutoTokenizer") if isinstance(asked, dict) else asked
    names = asked if isinstance(asked, list) else [asked]
    return next((str(name) for name in reversed(names) if name), None)
