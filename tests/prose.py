"""Search for phrases that the text of this project must not use, run by `make lint`.

    python tests/prose.py [ROOT]    prints every match, and exits with 1 if there is one

It reads the documents, and the comments, docstrings and messages of the package. CONTRIBUTING.md has the glossary.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

# What to write instead, by pattern.
RULES = {
    r"\bbehind\b": "after (for order)",
    r"\bgone on with\b|\bgo(es)? on (with|behind)\b|\b[Gg]oing on (with|behind)\b": "resume, continue",
    r"\b(is|be) said so\b": "a warning is printed",
    r"(?<![Tt]here )\b(is|are) no (?!longer|more|less)[a-z]+\b": "is not a …",
    r"\bcares? about\b|\bhow much .{1,30} cares?\b": "weighted by sensitivity",
    r'"""Of |: Of [a-z]': "a noun: statistics of, seconds of, …",
    r"\b[Tt]old (about|every|how|in|what|which)\b": "called with",
    r"\bwants (a|to be)\b": "needs a",
    r"\b(the|an) account (of|allows|fits)\b|\bin the account\b": "memory estimate",
    r"\bmissed least\b": "lowest output error after refit",
    r"\bsome (two|three|ten) minutes\b": "about",
    r"\ba home for\b": "a place for; supports",
    r"\bis alive\b|\b(states|tensors|what .{1,30}) lives?\b": "is stored; in use",
    r"\bdo not own every\b|\bown every sum\b": "dominate",
}
TEXTS = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/**/*.md",
    "slimllm/**/*.py",
    "slimllm/**/*.html",
    "kernels/*.py",
    "examples/*.py",
)


def found(root: Path) -> list[str]:
    """Return every match as `file:line: words; better: replacement`."""
    places = []
    for path in sorted({path for pattern in TEXTS for path in root.glob(pattern)}):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for pattern, instead in RULES.items():
                if match := re.search(pattern, line):
                    places.append(f"{path.relative_to(root)}:{number}: {match[0]!r}; better: {instead}")
    return places


if __name__ == "__main__":
    places = found(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
    print("\n".join([*places, f"{len(places)} places"]))
    sys.exit(bool(places))
