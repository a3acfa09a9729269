"""Output constrained to JSON, by llguidance.

A compiler turns a request's ``GrammarSpec`` into a ``Grammar`` (once: they are cached); each
sequence walks it with a ``GrammarMatcher`` of its own, which says before every token which ones may
follow. Compiling is bounded in input and in effort, needs no network and may run on any thread; a
matcher belongs to the engine's thread.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer
from torch import Tensor

from manyhats.engine.grammar_mask import GrammarMasks, empty_masks, mask_words
from manyhats.engine.schema_bounds import parse_schema, refuse
from manyhats.errors import EngineFailedError, ManyhatsError, RequestError
from manyhats.types import GrammarKind, GrammarSpec

CACHE_SIZE: Final = 64
"""Compiled grammars kept; the one unused for longest goes first."""

_ANY_OBJECT: Final = '{"type":"object"}'

# A model that likes white space must not be able to fill its output with it.
_OPTIONS: Final = {
    "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}",
    "lenient": False,
    "coerce_one_of": False,
    # \\u escapes in free strings; lone surrogates stay forbidden.
    "json_allow_general_unicode_escapes": True,
}


def _limits() -> LLParserLimits:
    """Bounds of llguidance's effort, half its defaults or less; errors name no parser state."""
    return LLParserLimits(
        initial_lexer_fuel=200_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=20_000,
        max_grammar_size=50_000,
        verbose_errors=False,
    )


class GrammarMatcher:
    """Where one sequence stands in its grammar. Not shared between threads."""

    def __init__(self, matcher: LLMatcher, eos_token_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._eos = eos_token_ids
        self._ended = False

    @property
    def is_finished(self) -> bool:
        """Whether nothing but end-of-sequence can follow, or it has come."""
        return self._ended or bool(self._matcher.is_stopped())

    def fill_mask(self, row: Tensor) -> None:
        """Write the allowed tokens into ``row``, a contiguous CPU int32 [ceil(V / 32)].

        When the grammar is complete only end-of-sequence tokens are allowed. Raises RequestError
        when the grammar needs more effort than a step may spend.
        """
        self._matcher.unsafe_compute_mask_ptr(row.data_ptr(), row.numel() * row.element_size())
        self._check()

    def accept(self, token_id: int) -> None:
        """Move past ``token_id``. Raises EngineFailedError when the grammar does not allow it.

        End-of-sequence tokens are allowed where the output may end; after one nothing moves any
        more.
        """
        if self._ended and token_id in self._eos:
            return
        if token_id in self._eos and self._matcher.is_accepting():
            self._ended = True
            return
        if self._ended or not self._matcher.consume_token(token_id):
            raise EngineFailedError(
                f"token {token_id} does not follow from response_format's grammar"
            )

    def replay(self, tokens: Iterable[int]) -> None:
        """Accept tokens generated before, in order: a new matcher comes to where an old one was."""
        for token in tokens:
            self.accept(token)

    def _check(self) -> None:
        if self._matcher.is_error():
            detail = _first_line(self._matcher.get_error())
            raise RequestError(
                f"response_format: the grammar cannot be followed further: {detail}",
                param="response_format",
            )


class Grammar:
    """A compiled constraint; immutable, shared by any number of sequences."""

    def __init__(self, prototype: LLMatcher, eos_token_ids: frozenset[int]) -> None:
        self._prototype = prototype
        self._eos = eos_token_ids
        self._lock = threading.Lock()

    def matcher(self) -> GrammarMatcher:
        """A new matcher at the grammar's start."""
        with self._lock:
            return GrammarMatcher(self._prototype.deep_copy(), self._eos)


class GrammarCompiler:
    """Compiles and caches grammars for one tokenizer. Thread-safe.

    ``vocab_size`` is the width of the model's logits (at least the tokenizer's vocabulary; the rest
    is never allowed). Making one reads the whole vocabulary: about a second. Raises ValueError
    without an end-of-sequence token, since no constrained output could end.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        cache_size: int = CACHE_SIZE,
    ) -> None:
        if not eos_token_ids:
            raise ValueError("constrained output needs at least one end-of-sequence token")
        plain = Tokenizer.from_str(tokenizer.to_str())
        plain.no_padding()
        plain.no_truncation()
        self._tokenizer = LLTokenizer(
            plain.to_str(),
            n_vocab=vocab_size,
            eos_token=sorted(eos_token_ids),
            slices=LLTokenizer.json_slices(),
        )
        self._vocab = vocab_size
        self._eos = eos_token_ids
        self._cache_size = cache_size
        self._cache: OrderedDict[GrammarSpec, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def cached(self) -> int:
        """Grammars in the cache."""
        return len(self._cache)

    def compile(self, spec: GrammarSpec) -> Grammar:
        """The grammar of ``spec``, from the cache where it was compiled before.

        Up to some tenths of a second of work for the largest schemas (the interpreter lock is
        released meanwhile): call it off the event loop. Raises RequestError (param
        ``response_format``) for a schema that is not valid, not supported, over a bound, or that no
        value satisfies.
        """
        with self._lock:
            found = self._cache.get(spec)
            if found is not None:
                self._cache.move_to_end(spec)
                return found
        grammar = self._build(spec)
        with self._lock:
            self._cache[spec] = grammar
            self._cache.move_to_end(spec)
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        return grammar

    def masks(
        self, matchers: Mapping[int, GrammarMatcher]
    ) -> tuple[GrammarMasks | None, dict[int, ManyhatsError]]:
        """The masks of a batch's constrained rows (``matchers``: by row), and the rows that failed.

        A failed row allows every token; its sequence must be ended with its error. None where no
        row is constrained.
        """
        if not matchers:
            return None, {}
        bits = empty_masks(len(matchers), self._vocab)
        errors: dict[int, ManyhatsError] = {}
        for i, (row, matcher) in enumerate(matchers.items()):
            try:
                matcher.fill_mask(bits[i])
            except RequestError as error:
                errors[row] = error
                bits[i] = -1
        return GrammarMasks(tuple(matchers), bits), errors

    def _build(self, spec: GrammarSpec) -> Grammar:
        if spec.kind is GrammarKind.JSON_OBJECT:
            text = _ANY_OBJECT
        elif spec.schema is None:
            refuse("json_schema needs a schema")
        else:
            text = json.dumps(parse_schema(spec.schema))
        try:
            source = LLMatcher.grammar_from_json_schema(text, overrides=_OPTIONS)
        except ValueError as error:
            refuse(f"the JSON schema cannot be served: {_first_line(str(error))}")
        prototype = LLMatcher(self._tokenizer, source, log_level=0, limits=_limits())
        if prototype.is_error():
            refuse(f"the JSON schema cannot be served: {_first_line(prototype.get_error())}")
        self._try_first_step(prototype.deep_copy())
        return Grammar(prototype, self._eos)

    def _try_first_step(self, matcher: LLMatcher) -> None:
        """Refuse a schema that no value satisfies, or whose first step is over the bounds."""
        row = np.zeros(mask_words(self._vocab), dtype=np.int32)
        matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if matcher.is_error() or matcher.is_stopped():
            detail = _first_line(matcher.get_error()) or "nothing can follow"
            refuse(f"no value satisfies the JSON schema, or it is over the bounds: {detail}")


def _first_line(message: str) -> str:
    return message.strip().split("\n", 1)[0][:300]
