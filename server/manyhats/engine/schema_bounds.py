"""What a JSON schema from a request may be, checked before any grammar is built from it."""

from __future__ import annotations

import enum
import json
from typing import Any, Final, NoReturn

from manyhats.errors import RequestError

MAX_SCHEMA_BYTES: Final = 64 * 1024
"""Largest schema, in bytes of UTF-8."""

MAX_SCHEMA_DEPTH: Final = 32
"""Deepest nesting of objects and arrays in a schema."""

_DATA_KEYWORDS: Final = frozenset({"const", "enum", "default", "examples"})
_NAME_KEYWORDS: Final = frozenset(
    {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
)
_REFERENCES: Final = frozenset({"$ref", "$dynamicRef", "$recursiveRef"})


class _Kind(enum.Enum):
    """What the keys of an object in a schema are."""

    SCHEMA = "keywords"
    NAMES = "names that the schema's author chose, each with a schema"
    DATA = "plain data, in which even $ref is only a string"


def refuse(message: str) -> NoReturn:
    """Raise RequestError naming ``response_format``."""
    raise RequestError(f"response_format: {message}", param="response_format")


def parse_schema(text: str) -> dict[str, Any]:
    """The schema as JSON.

    Raises RequestError when it is not a JSON object, is over ``MAX_SCHEMA_BYTES`` or
    ``MAX_SCHEMA_DEPTH``, refers to anything outside itself, or sets the compiler's own options.
    """
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_SCHEMA_BYTES:
        refuse(f"the JSON schema has {size} bytes; the bound is {MAX_SCHEMA_BYTES}")
    try:
        schema = json.loads(text, parse_constant=_constant)
    except RecursionError:
        refuse(f"the JSON schema is nested too deeply; the bound is {MAX_SCHEMA_DEPTH}")
    except ValueError as error:
        refuse(f"the JSON schema is not valid JSON: {error}")
    if not isinstance(schema, dict):
        refuse("the JSON schema must be a JSON object")
    if "x-guidance" in schema:
        refuse("the JSON schema must not set x-guidance, which is the grammar compiler's own")
    _walk(schema, 1, _Kind.SCHEMA)
    return schema


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _walk(node: object, depth: int, kind: _Kind) -> None:
    """Check one node of the schema and all below it."""
    if not isinstance(node, dict | list):
        return
    if depth > MAX_SCHEMA_DEPTH:
        refuse(f"the JSON schema is nested too deeply; the bound is {MAX_SCHEMA_DEPTH}")
    if isinstance(node, list):
        for item in node:
            _walk(item, depth + 1, kind)
        return
    for key, value in node.items():
        if kind is not _Kind.SCHEMA:
            _walk(value, depth + 1, _Kind.DATA if kind is _Kind.DATA else _Kind.SCHEMA)
            continue
        if key in _REFERENCES and isinstance(value, str) and not value.startswith("#"):
            refuse(
                f"{key} {value[:80]!r} points outside the schema; only references that start with "
                "'#' are followed"
            )
        below = _Kind.DATA if key in _DATA_KEYWORDS else _Kind.SCHEMA
        _walk(value, depth + 1, _Kind.NAMES if key in _NAME_KEYWORDS else below)
