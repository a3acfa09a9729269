"""The base's grammar compiler, made when the first request asks for one (it reads the whole
vocabulary).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import tokenizers

from manyhats.engine.grammar import Grammar, GrammarCompiler, GrammarMatcher
from manyhats.engine.grammar_mask import GrammarMasks
from manyhats.errors import ManyhatsError, RequestError
from manyhats.types import GrammarSpec


class Grammars:
    """Compiles output constraints for one base model. Thread-safe."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = eos_token_ids
        self._lock = threading.Lock()
        self._compiler: GrammarCompiler | None = None

    def check(self, spec: GrammarSpec) -> None:
        """Compiles, and keeps the result for the step loop. Raises RequestError as ``compile``
        does.
        """
        self.compile(spec)

    def compile(self, spec: GrammarSpec) -> Grammar:
        """See ``GrammarCompiler.compile``; also refused for a base without an end-of-sequence
        token.
        """
        return self._made().compile(spec)

    def masks(
        self, matchers: Mapping[int, GrammarMatcher]
    ) -> tuple[GrammarMasks | None, dict[int, ManyhatsError]]:
        """See ``GrammarCompiler.masks``."""
        return self._made().masks(matchers) if matchers else (None, {})

    def _made(self) -> GrammarCompiler:
        with self._lock:
            if self._compiler is None:
                if not self._eos:
                    raise RequestError(
                        "response_format: the base model has no end-of-sequence token, which "
                        "constrained "
                        "output needs",
                        param="response_format",
                    )
                self._compiler = GrammarCompiler(self._tokenizer, self._vocab_size, self._eos)
            return self._compiler
