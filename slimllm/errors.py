"""Exceptions for errors of the input and the environment: the command line prints them as a sentence and exits with 2."""

import errno
import re
import unicodedata

_LONGEST_REASON = 400  # characters; some errors repeat their whole input
_ORDER = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
_LONGEST = 1000  # characters; names and values read from files may have any length
# The runtime and the libraries have their own messages for what torch's allocator raises as OutOfMemoryError.
_GPU_EXHAUSTED = re.compile(
    r"(CUDA|Triton Error \[CUDA\]:|Cuda failure) ?(driver )?(error: )?'?out of memory|(CUBLAS|CUSOLVER)_STATUS_ALLOC_FAILED"
)


def _acts(character: str) -> bool:
    """Return whether a character controls a terminal instead of being visible: controls, line ends, writing direction."""
    return unicodedata.category(character) in ("Cc", "Zl", "Zp") or unicodedata.bidirectional(character) in _ORDER


class InputError(ValueError):
    """Error of the input, with one sentence that says what was wrong, what was got and what to do."""

    def __init__(self, sentence: str) -> None:
        shown = sentence.encode("utf-8", "backslashreplace").decode()
        shown = "".join(one.encode("unicode_escape").decode() if _acts(one) else one for one in shown)
        if len(shown) > _LONGEST:
            shown = f"{shown[: _LONGEST * 2 // 3]} … {shown[-_LONGEST // 3 :]}"
        super().__init__(shown)


class HopelessError(InputError):
    """Error of the input that shows only during a run, so that resuming the run would fail again."""


class OutputError(InputError):
    """Failure to write to the disk; what was written before is intact."""


class OtherRankError(InputError):
    """Error of another rank of the run, which that rank reports itself."""


class LostRankError(InputError):
    """Loss of another rank of the run; what was written before is intact."""


def first_line(error: BaseException) -> str:
    """Return the message of another library's error as the end of a sentence."""
    return f"{reason(error)}."


def reason(error: BaseException) -> str:
    """Return the first two lines of another library's error, for use within a sentence; the second may matter most."""
    text = f"there is no {error}" if isinstance(error, KeyError) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    words = "".join(character if character.isprintable() else " " for character in " ".join(lines[:2])).rstrip(".")
    return words if len(words) <= _LONGEST_REASON else f"{words[:_LONGEST_REASON]}…"


def exhausted(error: BaseException) -> str | None:
    """Return which memory an error reports as exhausted, `CPU` or `GPU`; None for any other error."""
    import torch

    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and _GPU_EXHAUSTED.search(text)):
        return "GPU"
    # torch has no exception type for it on the CPU, and mapping a file may also fail for lack of memory.
    told = isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in text or "Cannot allocate" in text)
    told = told or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    return "CPU" if told or isinstance(error, MemoryError) else None
