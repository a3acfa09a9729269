"""Log-probabilities in OpenAI's two formats, and tokens as labels."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from manyhats.engine.interface import Tokenizer
from manyhats.types import TokenLogprob

LOWEST = -9999.0
"""What OpenAI shows for a log-probability too low for JSON (minus infinity); nothing lower is
shown.
"""
_CACHED_TOKENS = 32_768


class TokenLabels:
    """Tokens as the API shows them; a bounded cache over the tokenizer, safe for threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.of = lru_cache(maxsize=_CACHED_TOKENS)(self._of)

    def _of(self, token_id: int) -> tuple[str, bytes, bool]:
        """(text, bytes, whether the token is special, that is, absent from decoded text)."""
        raw = self._tokenizer.token_bytes(token_id)
        special = bool(raw) and self._tokenizer.decode([token_id]) == ""
        return self._tokenizer.token_text(token_id), raw, special

    def legacy(self, token_id: int) -> str:
        r"""The label of the completions format: the text, or ``bytes:\xe2\x80`` where it is no
        whole UTF-8.
        """
        text, raw, _ = self.of(token_id)
        if "\ufffd" not in text:
            return text
        try:
            raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
        return text


class CompletionLogprobs:
    """One choice's ``logprobs`` of /v1/completions, piece by piece.

    ``text_offset`` counts characters of the choice's text (the echoed prompt included): a token
    that begins inside a character that earlier tokens began has the offset of that character's end
    so far.
    """

    def __init__(self, labels: TokenLabels) -> None:
        self._labels = labels
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def prompt(
        self, token_ids: Iterable[int], logprobs: Iterable[TokenLogprob | None]
    ) -> dict[str, list[Any]]:
        """The echoed prompt's part; the first token has no log-probability."""
        part = _empty()
        for token_id, entry in zip(token_ids, logprobs, strict=True):
            self._add(part, token_id, entry)
        return part

    def generated(self, logprobs: Iterable[TokenLogprob]) -> dict[str, list[Any]]:
        """The part of the tokens just generated."""
        part = _empty()
        for entry in logprobs:
            self._add(part, entry.token_id, entry)
        return part

    def _add(self, part: dict[str, list[Any]], token_id: int, entry: TokenLogprob | None) -> None:
        label = self._labels.legacy(token_id)
        part["tokens"].append(label)
        part["text_offset"].append(self._offset)
        if entry is None:
            part["token_logprobs"].append(None)
            part["top_logprobs"].append(None)
        else:
            top: dict[str, float] = {}
            for other, logprob in entry.top:  # best first: the better of two equal labels stays
                top.setdefault(self._labels.legacy(other), max(logprob, LOWEST))
            top.setdefault(label, max(entry.logprob, LOWEST))
            part["token_logprobs"].append(max(entry.logprob, LOWEST))
            part["top_logprobs"].append(top)
        _, raw, special = self._labels.of(token_id)
        if not special:
            self._offset += len(self._decoder.decode(raw))


def extend(into: dict[str, list[Any]], part: dict[str, list[Any]]) -> None:
    """Appends ``part`` of the completions format to ``into``."""
    for key, values in part.items():
        into.setdefault(key, []).extend(values)


def chat_logprobs(labels: TokenLabels, logprobs: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """The ``logprobs.content`` of /v1/chat/completions."""
    return [
        {
            **_chat_token(labels, entry.token_id, entry.logprob),
            "top_logprobs": [_chat_token(labels, token, logprob) for token, logprob in entry.top],
        }
        for entry in logprobs
    ]


def _chat_token(labels: TokenLabels, token_id: int, logprob: float) -> dict[str, Any]:
    text, raw, _ = labels.of(token_id)
    return {"token": text, "logprob": max(logprob, LOWEST), "bytes": list(raw)}


def _empty() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
