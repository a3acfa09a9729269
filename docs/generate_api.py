"""Writes ``docs/api.md`` from the OpenAPI document of the server's routes: ``make api-docs``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from manyhats.api.description import describe
from manyhats.api.factory import ALWAYS
from manyhats.app import ROUTES

PAGE = Path(__file__).resolve().parent / "api.md"
TITLES = {
    "openai": "Generation",
    "operations": "Health, metrics and logs",
    "admin": "Adapters",
    "drift": "Drift and feedback",
    "tenants": "Tenants and keys",
}
"""The sections in their order, by the routes' first tag."""

HEAD = """# API reference

Made from the server's OpenAPI document by `make api-docs`; a test compares the two. A running
server that has no keys, or was started with `--docs-open`, has the document itself at
`/openapi.json` and pages to try it at `/docs`.

Bodies are JSON unless said otherwise. An unknown field, a wrong type or a number out of its bound
is a 400 that names it. Fields in bold are required; `null` means the same as leaving a field out.
What is *known, not supported* is a field of OpenAI's that is refused by name wherever ignoring it
would change the answer. Beside what is listed here, bounds that are settings hold (`manyhats serve
--help`). An error has OpenAI's shape:

    {"error": {"message": "percent: must be at most 100", "type": "invalid_request_error",
               "code": "invalid_request", "param": "percent"}}

[Who may call what](tenants.md); what the calls mean for [routes](rollouts.md),
[evaluations](evaluation.md) and [drift](drift.md).
"""


def document() -> dict[str, Any]:
    """The OpenAPI document of all routes; no model is loaded for it."""
    app = FastAPI()
    for router in (*ALWAYS, *(module.router for module in ROUTES)):
        app.include_router(router)
    describe(app)
    return app.openapi()


def page(spec: Mapping[str, Any]) -> str:
    """The whole page. Raises KeyError for a tag that has no title here."""
    sections: dict[str, list[str]] = {tag: [] for tag in TITLES}
    for path, methods in spec["paths"].items():
        for method, operation in methods.items():
            told = "\n\n".join(_operation(method, path, operation, spec))
            sections[operation["tags"][0]].append(told)
    parts = [HEAD.strip()]
    for tag, operations in sections.items():
        parts += [f"## {TITLES[tag]}", *operations]
    return "\n\n".join(parts) + "\n"


def _operation(
    method: str, path: str, operation: Mapping[str, Any], spec: Mapping[str, Any]
) -> Iterator[str]:
    yield f"### {method.upper()} {path}"
    yield operation["description"].strip().replace("``", "`")
    given = [p for p in operation.get("parameters", []) if p["in"] != "path"]
    if given:
        rows = [
            (p["name"], p["in"], p["required"], p["schema"], p.get("description", ""))
            for p in given
        ]
        table = ["| parameter | in | value |", "|---|---|---|"]
        for name, place, required, schema, _ in rows:
            table.append(f"| {_name(name, required)} | {place} | {_typed(schema, spec)} |")
        yield "\n".join(table)
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        yield from _body(kind, content["schema"], spec)
    answers = [int(status) for status in operation["responses"]]
    good = ", ".join(str(s) for s in answers if s < 400)
    bad = ", ".join(str(s) for s in sorted(answers) if s >= 400)
    yield f"Answers: {good}; errors: {bad or 'none'}."


def _body(kind: str, schema: Mapping[str, Any], spec: Mapping[str, Any]) -> Iterator[str]:
    if kind != "application/json":
        yield f"As `{kind}`:"
    schema = _resolved(schema, spec)
    required = schema.get("required", ())
    fields = schema.get("properties", {})
    if fields:
        rows = [
            f"| {_name(name, name in required)} | {_typed(field, spec)} |"
            for name, field in fields.items()
        ]
        yield "\n".join(["| field | value |", "|---|---|", *rows])
    examples = schema.get("examples", [])
    if examples:
        yield "\n".join(f"    {json.dumps(example)}" for example in examples)


def _name(name: str, required: bool) -> str:
    return f"**`{name}`**" if required else f"`{name}`"


def _resolved(schema: Mapping[str, Any], spec: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" not in schema:
        return schema
    *_, name = schema["$ref"].split("/")
    found: Mapping[str, Any] = spec["components"]["schemas"][name]
    return found


def _typed(schema: Mapping[str, Any], spec: Mapping[str, Any]) -> str:
    """A schema in words, on one line of a table."""
    schema = _resolved(schema, spec)
    words = _kind(schema, spec)
    default = schema.get("default")
    if default not in (None, [], {}, ""):
        words += f"; default `{json.dumps(default)}`"
    return words.replace("|", "\\|")


def _kind(schema: Mapping[str, Any], spec: Mapping[str, Any]) -> str:
    for together in ("anyOf", "oneOf"):
        if together in schema:
            kinds = [_typed(s, spec) for s in schema[together] if s.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ", ".join(f"`{json.dumps(value)}`" for value in values)
    kind = schema.get("type", "*known, not supported*")
    if kind == "array":
        inner = _typed(schema["items"], spec) if "items" in schema else "values"
        return f"list of {inner}{_range(schema, 'minItems', 'maxItems')}"
    if kind == "object":
        return _object(schema, spec)
    if kind == "string":
        pattern = f" like `{schema['pattern']}`" if "pattern" in schema else ""
        return f"string{pattern}{_range(schema, 'minLength', 'maxLength', ' characters')}"
    return f"{kind}{_range(schema, 'minimum', 'maximum')}"


def _object(schema: Mapping[str, Any], spec: Mapping[str, Any]) -> str:
    if "properties" in schema:
        required = schema.get("required", ())
        fields = [
            f"{_name(name, name in required)}: {_typed(field, spec)}"
            for name, field in schema["properties"].items()
        ]
        return f"object ({'; '.join(fields)})"
    values = schema.get("additionalProperties")
    bounds = _range(schema, "minProperties", "maxProperties")
    return f"object of {_typed(values, spec)}{bounds}" if isinstance(values, dict) else "object"


def _range(schema: Mapping[str, Any], least: str, most: str, unit: str = "") -> str:
    bounds = (
        ("at least", schema.get(least)),
        ("above", schema.get("exclusiveMinimum") if least == "minimum" else None),
        ("at most", schema.get(most)),
        ("below", schema.get("exclusiveMaximum") if most == "maximum" else None),
    )
    words = [f"{word} {_number(value)}" for word, value in bounds if value is not None]
    return f", {' and '.join(words)}{unit}" if words else ""


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def main() -> int:
    """Writes the page."""
    PAGE.write_text(page(document()), "utf-8")
    sys.stdout.write(f"{PAGE}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
