"""Text out of tokens as they come: no broken characters, no part of a stop string.

The incremental decoding is ``tokenizers.decoders.DecodeStream``: a token's text is given out once
it no longer ends inside a UTF-8 sequence, so what has been given out never changes and, with the
rest from ``flush``, equals the tokenizer's decoding of all the ids. (One exception is inherent: a
tokenizer with byte fallback decodes a run of bytes as a whole, so an invalid byte late in a run
takes back characters before it; those stay as they were given out.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_INVALID_PREFIX = "Invalid prefix encountered"


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token let out: text that can no longer change, and whether a stop was found."""

    text: str
    stopped: bool


class TextStream:
    """Incremental decoding of one sequence's tokens, special tokens left out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._settled: list[int] = []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes; empty while a character is unfinished."""
        self._pending.append(token_id)
        try:
            text = self._stream.step(self._tokenizer, token_id)
        except Exception as error:  # the binding raises the bare class
            if not str(error).startswith(_INVALID_PREFIX):
                raise
            # Decoders with byte fallback show a whole run of bytes as broken once one of it is;
            # what was given out stays, and decoding goes on from the first token that was not.
            self._stream = DecodeStream(skip_special_tokens=True)
            self._settled = []
            text = self._stream.step(self._tokenizer, list(self._pending))
        if text:
            self._settled, self._pending = self._pending, []
        return text or ""

    def flush(self) -> str:
        """The text of tokens still held back; an unfinished character as the tokenizer shows it."""
        if not self._pending:
            return ""
        before = self._decode(self._settled)
        text = self._decode(self._settled + self._pending)
        pending, self._settled, self._pending = self._pending, [], []
        self._stream = DecodeStream(skip_special_tokens=True)
        if text.startswith(before):
            return text[len(before) :]
        return self._decode(pending)  # broken bytes after byte fallback, as in push

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


class StopFinder:
    """Finds the first of several stop strings in text that comes in pieces.

    First is the one whose last character comes first (of those that end together, the longest), so
    the cut does not depend on how the text was divided; for a single stop it is where ``str.find``
    finds it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that surely comes before any stop; whether one was found (the rest is dropped)."""
        if not self._stops:
            return text, False
        buffer = self._held + text
        hits = [(at + len(s), at) for s in self._stops if (at := buffer.find(s)) >= 0]
        if hits:
            self._held = ""
            return buffer[: min(hits)[1]], True
        keep = self._possible_start(buffer)
        self._held = buffer[keep:]
        return buffer[:keep], False

    def flush(self) -> str:
        """What was held back; no stop is in it."""
        text, self._held = self._held, ""
        return text

    def _possible_start(self, buffer: str) -> int:
        """Where the longest suffix of ``buffer`` begins that may be the start of a stop string."""
        for at in range(max(0, len(buffer) - self._longest + 1), len(buffer)):
            tail = buffer[at:]
            if any(stop.startswith(tail) for stop in self._stops):
                return at
        return len(buffer)


class Detokenizer:
    """The text of one sequence, token by token, cut before its first stop string.

    ``stops`` are the sequence's stop strings; raises ValueError when one is empty. Its state
    survives preemption: recomputed tokens are not pushed again.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._text = TextStream(tokenizer)
        self._finder = StopFinder(stops)
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stopped

    def push(self, token_id: int) -> Piece:
        """The text that became certain with ``token_id``. Raises RuntimeError after a stop."""
        if self._stopped:
            raise RuntimeError("the sequence has stopped; it takes no further token")
        text, self._stopped = self._finder.push(self._text.push(token_id))
        return Piece(text, self._stopped)

    def flush(self) -> str:
        """All that was held back, at the sequence's end; empty after a stop."""
        if self._stopped:
            return ""
        text, self._stopped = self._finder.push(self._text.flush())
        return text if self._stopped else text + self._finder.flush()
