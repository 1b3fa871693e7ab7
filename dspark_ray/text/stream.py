"""Incremental detokenisation: complete characters only, up to a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from dspark_ray.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextDelta:
    """Text added by a call of `TextStream.push`."""

    text: str
    """Lags behind the tokens where they end within a character or a possible stop string."""
    stopped: bool
    """Whether a stop string is complete; the text ends before it, or after it with `include_stop`."""
    num_tokens_kept: int
    """Number of pushed tokens in the text: all, or up to the one that completed the stop string."""
    stop: str | None = None
    """The stop string that was found."""


class TextStream:
    """One text being decoded. Tokens after a stop string are ignored."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        *,
        show_special: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """`show_special` includes special tokens. A stop string that ends before `min_tokens` is plain text."""
        self._tokenizer, self._stop, self.include_stop = tokenizer, tuple(stop), include_stop
        self._show_special, self._min_tokens = show_special, min_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._num_tokens = 0
        self._num_passed = 0
        """Characters of the held text that came before min_tokens: no stop string ends in them."""
        self._stopped = False

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Add tokens; returns the text that can no longer change."""
        if self._stopped:
            return TextDelta("", stopped=True, num_tokens_kept=0)
        shown = []
        for number, token_id in enumerate(token_ids, start=1):
            self._num_tokens += 1
            text, found = self._add(self._decoder.decode(self._tokenizer.token_bytes(token_id, self._show_special)))
            shown.append(text)
            if found is not None:
                return TextDelta("".join(shown), stopped=True, num_tokens_kept=number, stop=found)
        return TextDelta("".join(shown), stopped=False, num_tokens_kept=len(token_ids))

    def flush(self) -> str:
        """The held text at the end of the tokens; an unfinished character becomes U+FFFD."""
        if self._stopped:
            return ""
        text, found = self._add(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        self._stopped = True
        return text if found is not None else text + rest

    def _add(self, text: str) -> tuple[str, str | None]:
        """(text to return, stop string that is now complete)."""
        self._held += text
        if self._num_tokens < self._min_tokens:
            self._num_passed = len(self._held)
        first = self._first_stop()
        if first is not None:
            start, stop = first
            shown = self._held[: start + len(stop)] if self.include_stop else self._held[:start]
            self._held, self._stopped = "", True
            return shown, stop
        cut = len(self._held) - self._num_waiting()
        shown, self._held = self._held[:cut], self._held[cut:]
        self._num_passed = max(0, self._num_passed - cut)
        return shown, None

    def _first_stop(self) -> tuple[int, str] | None:
        """(start, stop string) of the stop string that ends first, as if characters came one at a time."""
        found = [(self._held.find(stop, max(0, self._num_passed - len(stop) + 1)), stop) for stop in self._stop]
        complete = [(start, stop) for start, stop in found if start >= 0]
        return min(complete, key=lambda hit: (hit[0] + len(hit[1]), hit[0]), default=None)

    def _num_waiting(self) -> int:
        """Length of the longest suffix of the held text that may begin a stop string."""
        longest = min(len(self._held), max(map(len, self._stop), default=1) - 1)
        ends = (length for length in range(longest, 0, -1) if self._may_become_stop(self._held[-length:]))
        return next(ends, 0)

    def _may_become_stop(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stop)
