"""A request's JSON body, read once (the middleware has bounded it) and checked against a strict
model.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

import orjson
from fastapi import Request
from pydantic import BaseModel, ValidationError

from manyhats.api.handlers import describe_validation
from manyhats.errors import RequestError

ModelT = TypeVar("ModelT", bound=BaseModel)


class _DuplicateKeyError(ValueError):
    """An object of the body names ``key`` twice."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the body names the key {key!r} twice")
        self.key = key


async def read_body(request: Request, model: type[ModelT]) -> ModelT:
    """The body as ``model``. Raises RequestError naming the field, or what is wrong with the JSON
    itself.
    """
    value = parse_json(await request.body())
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, not {_kind(value)}")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise describe_validation(error.errors(include_url=False, include_input=False)) from None


def parse_json(data: bytes) -> Any:
    """Strict JSON: no NaN or Infinity, no invalid UTF-8, no lone surrogate, no key twice in one
    object.

    Raises RequestError for anything else; a number too large for a double is refused as well.
    """
    if not data.strip():
        raise RequestError("the body is empty: a JSON object is expected")
    try:
        value = orjson.loads(data)
        # orjson keeps the last of two equal keys in silence; the standard library shows them
        json.loads(data, object_pairs_hook=_refuse_duplicates)
    except _DuplicateKeyError as error:
        raise RequestError(str(error), param=error.key) from None
    except RecursionError:
        raise RequestError("the body is not accepted: it is nested too deeply") from None
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
    return value


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> None:
    seen = set()
    for key, _ in pairs:
        if key in seen:
            raise _DuplicateKeyError(key[:100])
        seen.add(key)


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", str: "a string", list: "an array"}
    return names.get(type(value), "a number")
