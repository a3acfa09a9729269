"""A validated body to ``SamplingParams``: the bounds that are settings, one seed a choice."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, replace

import orjson

from manyhats.api.schemas import ChatRequest, CompletionRequest, ResponseFormat, SamplingFields
from manyhats.config import Settings
from manyhats.engine.interface import ModelInfo
from manyhats.errors import RequestError
from manyhats.types import GrammarKind, GrammarSpec, SamplingParams

MAX_STOP_TOKEN_IDS = 64
"""Bound of ``stop_token_ids``."""
MAX_LOGIT_BIAS = 1024
"""Bound of the entries of ``logit_bias``."""
MAX_SCHEMA_BYTES = 64 * 1024
"""Bound of a JSON schema's text."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What bounds a request: the operator's settings and the model."""

    settings: Settings
    model: ModelInfo

    def within(self, name: str, value: int, bound: int) -> None:
        """Raises RequestError where ``value`` of the field ``name`` is over ``bound``."""
        if value > bound:
            raise RequestError(f"{name} is {value}: the bound is {bound}", param=name)

    def token_id(self, name: str, value: int) -> None:
        """Raises RequestError where ``value`` is no token of the model."""
        if not 0 <= value < self.model.vocab_size:
            raise RequestError(
                f"{name}: token id {value} is outside the vocabulary of {self.model.vocab_size}",
                param=name,
            )


def check(body: SamplingFields, bounds: Bounds) -> None:
    """The bounds that need no prompt, before anything is tokenized. Raises RequestError."""
    settings = bounds.settings
    bounds.within("n", body.n or 1, settings.max_n)
    if len(body.stop) > settings.max_stops:
        raise RequestError(
            f"stop has {len(body.stop)} strings: the bound is {settings.max_stops}", param="stop"
        )
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream to be true", param="stream_options")
    stop_ids = body.stop_token_ids or []
    if len(stop_ids) > MAX_STOP_TOKEN_IDS:
        raise RequestError(
            f"stop_token_ids has {len(stop_ids)} entries: the bound is {MAX_STOP_TOKEN_IDS}",
            param="stop_token_ids",
        )
    if len(body.logit_bias) > MAX_LOGIT_BIAS:
        raise RequestError(
            f"logit_bias has {len(body.logit_bias)} entries: the bound is {MAX_LOGIT_BIAS}",
            param="logit_bias",
        )
    for token in stop_ids:
        bounds.token_id("stop_token_ids", token)
    for token, _ in body.logit_bias:
        bounds.token_id("logit_bias", token)


def completion_params(body: CompletionRequest, max_tokens: int, bounds: Bounds) -> SamplingParams:
    """One choice's parameters for ``/v1/completions``, with the caller's seed (or 0). Raises
    RequestError.
    """
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError(
            f"best_of is {body.best_of}: only best_of equal to n ({body.n or 1}) is supported",
            param="best_of",
        )
    if body.logprobs is not None:
        bounds.within("logprobs", body.logprobs, bounds.settings.max_logprobs)
    params = _common(body, max_tokens, bounds)
    return replace(
        params, logprobs=body.logprobs, prompt_logprobs=body.logprobs if body.echo else None
    )


def chat_params(body: ChatRequest, max_tokens: int, bounds: Bounds) -> SamplingParams:
    """One choice's parameters for ``/v1/chat/completions``, with the caller's seed (or 0). Raises
    RequestError.
    """
    if body.top_logprobs is not None:
        if not body.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
        bounds.within("top_logprobs", body.top_logprobs, bounds.settings.max_logprobs)
    params = _common(body, max_tokens, bounds)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return replace(params, logprobs=logprobs, grammar=_grammar(body.response_format))


def choices(params: SamplingParams, seed: int | None, n: int) -> tuple[SamplingParams, ...]:
    """``n`` copies of ``params`` with distinct seeds.

    Choice 0 has the caller's seed itself, so that it is what the same request with n = 1 gives;
    choice i has the first 63 bits of SHA-256 over ``seed:i``. Where the caller gave none, a seed is
    drawn.
    """
    first = secrets.randbits(63) if seed is None else seed
    return tuple(replace(params, seed=first if i == 0 else _derived(first, i)) for i in range(n))


def _derived(seed: int, index: int) -> int:
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _common(body: SamplingFields, max_tokens: int, bounds: Bounds) -> SamplingParams:
    if (body.min_tokens or 0) > max_tokens:
        raise RequestError(
            f"min_tokens is {body.min_tokens}: the bound is max_tokens, {max_tokens}",
            param="min_tokens",
        )
    return SamplingParams(
        max_tokens=max_tokens,
        seed=body.seed or 0,
        min_tokens=body.min_tokens or 0,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=min(max(body.top_k or 0, 0), bounds.model.vocab_size),
        min_p=body.min_p or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=body.logit_bias,
        stop=body.stop,
        stop_token_ids=frozenset(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
    )


def _grammar(wanted: ResponseFormat | None) -> GrammarSpec | None:
    if wanted is None:
        return None
    if wanted.type != "json_schema":
        if wanted.json_schema is not None:
            raise RequestError(
                f"response_format.json_schema does not go with type {wanted.type!r}",
                param="response_format.json_schema",
            )
        return GrammarSpec(GrammarKind.JSON_OBJECT) if wanted.type == "json_object" else None
    if wanted.json_schema is None:
        raise RequestError(
            "response_format.json_schema is required with type 'json_schema'",
            param="response_format.json_schema",
        )
    name = "response_format.json_schema.schema"
    try:
        text = orjson.dumps(wanted.json_schema.schema_)
    except TypeError:
        raise RequestError(f"{name} is nested too deeply", param=name) from None
    if len(text) > MAX_SCHEMA_BYTES:
        raise RequestError(
            f"{name} has {len(text)} bytes: the bound is {MAX_SCHEMA_BYTES}", param=name
        )
    return GrammarSpec(GrammarKind.JSON_SCHEMA, text.decode())
