"""The OpenAPI document is good enough to use from /docs, whatever route is added."""

from __future__ import annotations

import jsonschema
import pytest
from support.api import Api

from manyhats.api import admin, operations, rollouts, sharing, tenants, usage, vllm
from manyhats.api.description import statuses


@pytest.fixture(scope="module")
def document():
    modules = (admin, operations, rollouts, sharing, tenants, usage, vllm)
    return Api(routers=[m.router for m in modules]).get("/openapi.json").json()


def operations_of(document):
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def test_every_route_says_what_it_does_and_how_it_fails(document):
    seen = 0
    for path, method, operation in operations_of(document):
        seen += path.startswith("/admin")
        where = (method, path)
        assert operation["summary"], where
        assert len(operation["description"]) > 10, where
        answers = operation["responses"]
        assert any(code.startswith("2") for code in answers), where
        assert "422" not in answers, where
        for status in statuses(path, method):
            answer = answers[str(status)]
            assert answer["description"], where
            [content] = answer["content"].values()
            assert content["schema"] == {"$ref": "#/components/schemas/Error"}
            jsonschema.validate(content["example"], document["components"]["schemas"]["Error"])
        if path.startswith("/admin"):
            assert {"400", "401", "403", "503"} <= set(answers), where
            assert method == "get" or {"404", "409"} <= set(answers), where
    assert seen > 25


def test_the_examples_of_bodies_are_bodies(document):
    seen = 0
    for path, method, operation in operations_of(document):
        for content in operation.get("requestBody", {}).get("content", {}).values():
            for example in content["schema"].get("examples", []):
                jsonschema.validate(example, content["schema"])
                seen += 1
        if path in ("/admin/adapters/{name}/canary", "/admin/adapters") and method == "post":
            assert operation["requestBody"]["content"]["application/json"]["schema"]["examples"]
    assert seen >= 12


def test_what_is_answered_is_of_the_shape_that_is_documented(document):
    schema = document["components"]["schemas"]["Error"]
    api = Api(routers=[admin.router, rollouts.router])
    for answer in (
        api.complete(model="nobody"),
        api.post("/admin/adapters", b"{"),
        api.get("/nowhere"),
    ):
        jsonschema.validate(answer.json(), schema)
