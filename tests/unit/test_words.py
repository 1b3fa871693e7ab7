"""Phrases that puzzle a newcomer stay out of code, comments, messages and documentation.

Each has a plain word: `CONTRIBUTING.md` says how to find it. The changelog and the decision on words may quote them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("dspark_ray", "kernels", "autoscale", "deployments", "benchmarks", "tests", "docs")
SUFFIXES = {".py", ".yaml", ".yml", ".md", ".toml", ".svg"}
MAY_QUOTE = {"CHANGELOG.md", "docs/decisions/0015-rooms-and-words.md", "tests/unit/test_words.py"}

PHRASES = {
    # Clauses without a subject.
    "whoever": "name the component",
    "cannot be meant": "invalid",
    "can be meant": "valid",
    "for ever": "indefinitely",
    "of late": "recently",
    "what of late": "the recent ratio",
    "rows? of nobody": "padding rows",
    "belongs? to nobody": "padding",
    "requests? of nobody": "padding",
    "(drafts?|drafting|drafted) for nobody": "no drafts, bypass",
    "(nobody|everybody|somebody) (is|was|has|can|that|who)": "name the requests or rows",
    "(nobody|everybody|somebody) (wants|asks|drafts|chose|chooses|knows|wrote|looks)": "name the requests or rows",
    "a sample that no": "an impossible sample",
    "at every whim": "with hysteresis and a rate limit",
    "what is said": "the response",
    # Names and metaphors.
    "purse": "exploration budget",
    "farewell": "drain",
    "Wish": "desired replicas",
    "_[Pp]romise": "throughput target",
    "_obey": "_handle",
    "_truth": "acceptance ratio",
    "_news": "pending",
    "_nothing": "empty_proposal",
    "STEPS_PER_LESSON": "update interval",
    "STEPS_BETWEEN_LOOKS": "probe interval",
    "holding\\(sizes": "padded_size",
    "_?temper": "apply_temperature",
    # Documents that are not in the repository.
    "specification,? (section )?[0-9]": "a section of docs/model.md, docs/dspark.md or the paper",
    "(layout|module|DeepSeek-V4) specification": "a section of docs/model.md, docs/dspark.md or the paper",
}


def texts() -> Iterator[tuple[str, str]]:
    """Path and content of every text that people read."""
    files = [*ROOT.glob("*"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*"))]
    for file in sorted(file for file in files if file.is_file() and file.suffix in SUFFIXES):
        path = file.relative_to(ROOT).as_posix()
        if path not in MAY_QUOTE:
            yield path, file.read_text(encoding="utf-8")


TEXTS = list(texts())


@pytest.mark.parametrize("phrase", PHRASES)
def test_nothing_says(phrase: str) -> None:
    words = re.sub(r" ", r"[\\s#]+", phrase)
    pattern = re.compile(rf"(?<![A-Za-z]){words}(?![A-Za-z])", re.IGNORECASE if phrase[0].islower() else 0)
    found = [
        f"{path}:{text.count(chr(10), 0, match.start()) + 1}: {' '.join(match.group().split())}"
        for path, text in TEXTS
        for match in pattern.finditer(text)
    ]
    assert not found, f"say {PHRASES[phrase]!r} instead:\n" + "\n".join(found)
