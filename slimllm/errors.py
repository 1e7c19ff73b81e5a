"""Exceptions that mean "not our fault": the command line prints them as a sentence and exits with 2."""

import unicodedata

_LONGEST_REASON = 400  # characters; some errors repeat all of what they did not like
_ORDER = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
_LONGEST = 1000  # characters: names and values out of files have any length, and any characters


def _acts(character: str) -> bool:
    """Whether a character does something to a terminal instead of being seen: control, line ends, the order of writing."""
    return unicodedata.category(character) in ("Cc", "Zl", "Zp") or unicodedata.bidirectional(character) in _ORDER


class InputError(ValueError):
    """What was wrong, what was got and what to do, in one sentence."""

    def __init__(self, sentence: str) -> None:
        shown = sentence.encode("utf-8", "backslashreplace").decode()
        shown = "".join(one.encode("unicode_escape").decode() if _acts(one) else one for one in shown)
        if len(shown) > _LONGEST:
            shown = f"{shown[: _LONGEST * 2 // 3]} … {shown[-_LONGEST // 3 :]}"
        super().__init__(shown)


class HopelessError(InputError):
    """The input is at fault in a way that only a whole run shows: resuming it would fail again."""


class OutputError(InputError):
    """The disk did not take what was written; what is there already is good."""


class OtherRankError(InputError):
    """Another rank of the run has met an error, and tells the user itself."""


class LostRankError(InputError):
    """Another rank of the run is gone; what is written already is good."""


def first_line(error: BaseException) -> str:
    """Give an error of another library as the end of a sentence."""
    return f"{reason(error)}."


def reason(error: BaseException) -> str:
    """Give an error of another library within a sentence; it may say what matters in its second line."""
    text = f"there is no {error}" if isinstance(error, KeyError) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    words = "".join(character if character.isprintable() else " " for character in " ".join(lines[:2])).rstrip(".")
    return words if len(words) <= _LONGEST_REASON else f"{words[:_LONGEST_REASON]}…"
