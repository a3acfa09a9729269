"""The base model's tokenizer behind the small interface that the API and the engine use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2
import tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from manyhats.engine.interface import ChatTemplateError
from manyhats.errors import ConfigError


class ModelTokenizer:
    """Implements ``engine.interface.Tokenizer`` over a fast transformers tokenizer.

    The chat template is the model's own, run by transformers in jinja's immutable sandbox; a
    request can neither bring a template nor arguments for it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ConfigError(
                f"model: its tokenizer ({type(tokenizer).__name__}) has no fast version "
                "(tokenizer.json)",
                param="model",
            )
        self._hf: Any = tokenizer

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The Rust tokenizer underneath (for incremental decoding and grammars)."""
        backend: tokenizers.Tokenizer = self._hf.backend_tokenizer
        return backend

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's end-of-sequence id, if it has one."""
        eos = self._hf.eos_token_id
        return None if eos is None else int(eos)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``. ``add_special_tokens`` adds what the model's post-processor adds
        (BOS, say).
        """
        return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids."""
        return str(self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        """One token as text; bytes that are no whole UTF-8 character show as replacement
        characters.
        """
        return str(self.backend.decode([token_id], skip_special_tokens=False))

    def token_bytes(self, token_id: int) -> bytes:
        """One token's own bytes, also where it is only a part of a UTF-8 character (byte-level
        vocabularies).
        """
        piece = self.backend.id_to_token(token_id)
        if piece is None:
            return b""
        if not self._byte_level or token_id in self._special_ids:
            return self.token_text(token_id).encode()
        return bytes(_BYTE_OF[char] for char in piece if char in _BYTE_OF)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The model's chat template over ``messages`` with the generation prompt. Raises
        ChatTemplateError.
        """
        if not self._hf.chat_template:
            raise ChatTemplateError("the base model has no chat template; use /v1/completions")
        try:
            return str(
                self._hf.apply_chat_template(
                    [dict(m) for m in messages], tokenize=False, add_generation_prompt=True
                )
            )
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the chat template refused the messages: {error}") from error

    @cached_property
    def _byte_level(self) -> bool:
        decoder = self.backend.decoder
        return decoder is not None and "ByteLevel" in str(decoder)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.backend.get_added_tokens_decoder())


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes (``bytes_to_unicode`` of openai/gpt-2), inverted."""
    keep = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in keep}
    others = [b for b in range(256) if b not in set(keep)]
    return table | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _bytes_of_characters()
