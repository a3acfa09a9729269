"""What a version is asked: pairs of prompt and completion, and rules for what it says by itself.

Both come as JSONL, one object a line. A pair is ``{"prompt", "completion"}`` or ``{"messages"}``
whose last message is the assistant's; a rule is ``{"prompt"}`` or ``{"messages"}`` with one or more
of ``must_match``, ``must_not_match`` (regular expressions, searched for in the answer) and
``json_schema`` (the whole answer is JSON that fits), and ``max_tokens``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Annotated, Any, Final, Literal, Self, TypeVar

import jsonschema
import orjson
import referencing
import referencing.exceptions
import regex
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from manyhats.engine.interface import Tokenizer
from manyhats.errors import RequestError

MAX_LINES: Final = 1000
"""Bound of the pairs, and of the rules, of one adapter."""

MAX_CHARS: Final = 1 << 20
"""Bound of each of the two texts, characters."""

_Text = Annotated[str, Field(min_length=1, max_length=32 << 10)]
_Pattern = Annotated[str, Field(min_length=1, max_length=1000)]

_REGEX_TIMEOUT_S: Final = 0.5


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Message(_Line):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: _Text


class _Asked(_Line):
    """``prompt`` as it is, or ``messages`` through the model's chat template."""

    prompt: _Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=64)] | None = None

    def _one_source(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, one of them")


class Pair(_Asked):
    """A prompt and what should follow it."""

    completion: _Text | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        self._one_source()
        if self.messages is None and self.completion is None:
            raise ValueError("completion is missing")
        if self.messages is not None:
            if self.completion is not None:
                raise ValueError("completion is the last of messages; give one of them")
            if len(self.messages) < 2 or self.messages[-1].role != "assistant":
                raise ValueError("messages must end with the assistant's, after another one")
        return self

    @property
    def answer(self) -> str:
        """What should follow."""
        return self.messages[-1].content if self.messages else self.completion or ""


class Rule(_Asked):
    """A prompt and what holds for the answer that is generated greedily."""

    must_match: _Pattern | None = None
    must_not_match: _Pattern | None = None
    json_schema: dict[str, Any] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=512)] = 64

    @model_validator(mode="after")
    def _whole(self) -> Self:
        self._one_source()
        patterns = (self.must_match, self.must_not_match)
        if self.json_schema is None and patterns == (None, None):
            raise ValueError("give must_match, must_not_match or json_schema")
        for pattern in patterns:
            if pattern is not None:
                try:
                    regex.compile(pattern)
                except regex.error as error:
                    raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        if self.json_schema is not None:
            if _has_key(self.json_schema, "patternProperties"):
                raise ValueError("json_schema: patternProperties is not supported")
            try:
                jsonschema.Draft202012Validator.check_schema(self.json_schema)
            except jsonschema.SchemaError as error:
                raise ValueError(f"json_schema: {error.message}") from None
        return self

    def broken_by(self, answer: str) -> str | None:
        """Which part of the rule the answer breaks, None where it keeps all."""
        try:
            if self.must_match and not _found(self.must_match, answer):
                return "must_match"
            if self.must_not_match and _found(self.must_not_match, answer):
                return "must_not_match"
        except TimeoutError:
            return f"the regular expression took over {_REGEX_TIMEOUT_S:g} s"
        if self.json_schema is not None:
            try:
                value = orjson.loads(answer)
            except orjson.JSONDecodeError:
                return "json_schema: the answer is not JSON"
            # An empty registry: a schema of a caller's must not make us fetch anything.
            validator = _Validator(self.json_schema, registry=referencing.Registry())
            try:
                if not validator.is_valid(value):
                    return "json_schema"
            except (referencing.exceptions.Unresolvable, RecursionError, TimeoutError) as error:
                return f"json_schema cannot be held against the answer: {error}"
        return None


def _pattern(_validator: Any, pattern: str, value: Any, _schema: Any) -> Iterator[Any]:
    """The keyword ``pattern`` with a bound on its time."""
    if isinstance(value, str) and not _found(pattern, value):
        yield jsonschema.ValidationError("pattern")


_Validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"pattern": _pattern})


def _has_key(value: Any, key: str) -> bool:
    if isinstance(value, dict):
        return key in value or any(_has_key(item, key) for item in value.values())
    return isinstance(value, list) and any(_has_key(item, key) for item in value)


_LineT = TypeVar("_LineT", Pair, Rule)


def read_pairs(text: str, param: str = "data") -> tuple[Pair, ...]:
    """The pairs of a JSONL text. Raises RequestError naming the line and the field."""
    return _read(text, Pair, param)


def read_rules(text: str, param: str = "rules") -> tuple[Rule, ...]:
    """The rules of a JSONL text. Raises RequestError naming the line and the field."""
    return _read(text, Rule, param)


@cache
def general_pairs() -> tuple[Pair, ...]:
    """The probes that come with the server: general knowledge, instructions, formats."""
    file = resources.files("manyhats.lifecycle.evaluation") / "general.jsonl"
    return read_pairs(file.read_text("utf-8"))


def tokens_of(pair: Pair, tokenizer: Tokenizer) -> tuple[tuple[int, ...], int]:
    """Token ids of prompt and answer, and where the answer starts. Raises ChatTemplateError."""
    head = prompt_tokens(pair, tokenizer, drop_last=True)
    answer = tokenizer.encode(pair.answer, add_special_tokens=False)
    return (*head, *answer), len(head)


def prompt_tokens(
    asked: Pair | Rule, tokenizer: Tokenizer, *, drop_last: bool = False
) -> list[int]:
    """Token ids of what is asked; with ``drop_last`` without the last message."""
    if asked.messages is None:
        return tokenizer.encode(asked.prompt or "")
    messages = asked.messages[:-1] if drop_last else asked.messages
    rendered = tokenizer.render_chat([m.model_dump() for m in messages])
    return tokenizer.encode(rendered, add_special_tokens=False)


def _found(pattern: str, answer: str) -> bool:
    return regex.search(pattern, answer, timeout=_REGEX_TIMEOUT_S) is not None


def _read(text: str, kind: type[_LineT], param: str) -> tuple[_LineT, ...]:
    if len(text) > MAX_CHARS:
        raise RequestError(f"{param}: at most {MAX_CHARS} characters", param=param)
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if len(lines) > MAX_LINES:
        raise RequestError(f"{param}: {len(lines)} lines, at most {MAX_LINES}", param=param)
    return tuple(_read_line(kind, line, f"{param}: line {n}", param) for n, line in lines)


def _read_line(kind: type[_LineT], line: str, where: str, param: str) -> _LineT:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"{where} is not JSON: {error}", param=param) from None
    if not isinstance(value, Mapping):
        raise RequestError(f"{where} is not a JSON object", param=param)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise RequestError(
            f"{where}: {field + ': ' if field else ''}{message}", param=param
        ) from None
