"""The field types of the request models: parsers with one clear message each, and OpenAI's fields
that are refused.

A plain parser in place of a union of types: pydantic reports every branch of a union that did not
match, and none of those messages would name the bound.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import AfterValidator, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from manyhats.lifecycle.compositions import MAX_MEMBERS, MAX_WEIGHT, NamedComposition
from manyhats.types import CompositionKind

MAX_STOP_CHARS: Final = 256
"""Characters of one stop string."""
MAX_PROMPTS: Final = 64
"""Prompts in one completions request."""

Prompt = str | tuple[int, ...]
"""One prompt: text, or token ids."""


def problem(message: str, at: str = "") -> PydanticCustomError:
    """A validation problem; ``at`` is appended to the field's name (``[1].type``)."""
    return PydanticCustomError("manyhats", "{text}", {"text": message, "at": at})


def parse_prompts(value: object) -> tuple[Prompt, ...]:
    """OpenAI's four forms of ``prompt`` (string, strings, token ids, lists of token ids) as a tuple
    of prompts.
    """
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise problem(
            "must be a string, a list of strings, a list of token ids or a list of such lists"
        )
    if not value:
        raise problem("is an empty list: at least one prompt is needed")
    if type(value[0]) is int:
        return (_token_ids(value, ""),)
    if len(value) > MAX_PROMPTS:
        raise problem(f"has {len(value)} prompts: the bound is {MAX_PROMPTS}")
    if isinstance(value[0], str):
        for i, item in enumerate(value):
            if not isinstance(item, str):
                raise problem("must be a string as the items before it are", f"[{i}]")
        return tuple(value)
    return tuple(_token_ids(item, f"[{i}]") for i, item in enumerate(value))


def _token_ids(value: object, at: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise problem("must be a list of token ids", at)
    for i, item in enumerate(value):
        if type(item) is not int:
            raise problem("must be a token id, an integer", f"{at}[{i}]")
    return tuple(value)


def parse_stop(value: object) -> tuple[str, ...]:
    """``stop`` (null, a string, or strings) as a tuple; each has 1 to MAX_STOP_CHARS characters."""
    if value is None:
        return ()
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list):
        raise problem("must be a string or a list of strings")
    for i, item in enumerate(items):
        at = "" if isinstance(value, str) else f"[{i}]"
        if not isinstance(item, str):
            raise problem("must be a string", at)
        if not 0 < len(item) <= MAX_STOP_CHARS:
            raise problem(f"has {len(item)} characters: the bound is 1 to {MAX_STOP_CHARS}", at)
    return tuple(items)


def parse_logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    """``logit_bias`` (token id as a string, to -100..100) as pairs in the order given."""
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise problem("must be an object from token ids to biases")
    pairs: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise problem(f"key {key[:40]!r} is not a token id")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise problem("must be a number within -100 to 100", f".{key}")
        if int(key) in pairs:
            raise problem(f"names token {int(key)} twice")
        pairs[int(key)] = float(bias)
    return tuple(pairs.items())


def parse_content(value: object) -> str:
    """A message's content: a string, or text parts, which are joined by a newline."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise problem("must be a string or a non-empty list of text parts")
    texts: list[str] = []
    for i, part in enumerate(value):
        if not isinstance(part, dict):
            raise problem("must be an object with type and text", f"[{i}]")
        if part.get("type") != "text":
            raise problem(
                "must be 'text': this model takes no other kind of content", f"[{i}].type"
            )
        if not isinstance(part.get("text"), str):
            raise problem("must be a string", f"[{i}].text")
        for key in part:
            if key not in ("type", "text"):
                raise problem("unknown field", f"[{i}].{key[:100]}")
        texts.append(part["text"])
    return "\n".join(texts)


_LIST: Final = "a list of names"
_OBJECT: Final = "an object from names to weights"
_FORMS: Final = {
    CompositionKind.STACK.value: (_LIST,),
    CompositionKind.WEIGHTED.value: (_OBJECT,),
    CompositionKind.ENSEMBLE.value: (_LIST, _OBJECT),
}
"""How the members of each kind may be given."""


def parse_composition(value: object) -> NamedComposition | None:
    """One kind with 1 to MAX_MEMBERS members: ``{"stack": [names]}``, ``{"weighted": {name:
    weight}}``, or ``{"ensemble": ...}`` with either.
    """
    if value is None:
        return None
    kinds = [kind.value for kind in CompositionKind]
    if not isinstance(value, dict) or len(value) != 1:
        raise problem(f"must be an object with one field: {' or '.join(kinds)}")
    [(kind, members)] = value.items()
    if kind not in kinds:
        raise problem(f"unknown field (known: {', '.join(kinds)})", f".{kind[:100]}")
    form = _LIST if isinstance(members, list) else _OBJECT if isinstance(members, dict) else ""
    if not isinstance(members, list | dict) or form not in _FORMS[kind]:
        raise problem(f"must be {' or '.join(_FORMS[kind])}", f".{kind}")
    if not 0 < len(members) <= MAX_MEMBERS:
        raise problem(f"has {len(members)} adapters: the bound is 1 to {MAX_MEMBERS}", f".{kind}")
    for i, name in enumerate(members):
        if not isinstance(name, str) or not 0 < len(name) <= 256:
            raise problem("must be a name of 1 to 256 characters", f".{kind}[{i}]")
    weights = tuple(members.values()) if isinstance(members, dict) else ()
    for name, weight in zip(members, weights, strict=False):
        # not a <= b <= c: NaN is within no bound
        if type(weight) not in (int, float) or not abs(weight) <= MAX_WEIGHT:
            bound = f"{MAX_WEIGHT:g}"
            raise problem(f"must be a number within -{bound} to {bound}", f".{kind}.{name[:140]}")
        if kind == CompositionKind.ENSEMBLE.value and weight <= 0:
            raise problem("must be a number over 0", f".{kind}.{name[:140]}")
    return NamedComposition(CompositionKind(kind), tuple(members), tuple(map(float, weights)))


def only(*allowed: object, why: str = "is not supported") -> Any:
    """A field of OpenAI's that is accepted at values that cannot matter and refused, by name, at
    any other.
    """
    accepted = [(type(item), item) for item in (None, *allowed)]
    shown = ", ".join("null" if v is None else str(v).lower() for _, v in accepted)

    def check(value: object) -> object:
        if (type(value), value) not in accepted:
            raise problem(f"{why}: leave it out (accepted: {shown})")
        return value

    return AfterValidator(check)


_TEXTS = {"type": "array", "items": {"type": "string"}}
_IDS = {"type": "array", "items": {"type": "integer"}}
_PARTS = {
    "type": "array",
    "items": {
        "type": "object", "required": ["type", "text"], "additionalProperties": False,
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    },
}  # fmt: skip

Prompts = Annotated[
    tuple[Prompt, ...],
    PlainValidator(parse_prompts),
    WithJsonSchema({"anyOf": [{"type": "string"}, _TEXTS, _IDS, {"type": "array", "items": _IDS}]}),
]
Stops = Annotated[
    tuple[str, ...],
    PlainValidator(parse_stop),
    WithJsonSchema({"anyOf": [{"type": "string"}, _TEXTS, {"type": "null"}]}),
]
LogitBias = Annotated[
    tuple[tuple[int, float], ...],
    PlainValidator(parse_logit_bias),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}}),
]
Content = Annotated[
    str, PlainValidator(parse_content), WithJsonSchema({"anyOf": [{"type": "string"}, _PARTS]})
]
_STACK = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_MEMBERS}
_WEIGHTED = {
    "type": "object", "minProperties": 1, "maxProperties": MAX_MEMBERS,
    "additionalProperties": {"type": "number", "minimum": -MAX_WEIGHT, "maximum": MAX_WEIGHT},
}  # fmt: skip
CompositionField = Annotated[
    NamedComposition | None,
    PlainValidator(parse_composition),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "object", "required": [kind], "additionalProperties": False,
                 "properties": {kind: members}}
                for kind, members in (
                    ("stack", _STACK), ("weighted", _WEIGHTED),
                    ("ensemble", {"anyOf": [_STACK, _WEIGHTED]}),
                )
            ] + [{"type": "null"}]
        }
    ),
]  # fmt: skip
Metadata = Annotated[
    dict[
        Annotated[str, Field(max_length=64)],
        Annotated[str, Field(max_length=512)],
    ],
    Field(max_length=16),
]
