"""The field ``adapter`` of a request, and compositions in the admin routes."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient
from support.adapter_service import open_adapters, write_adapter
from support.api import Api, assert_error

from manyhats.api import admin
from manyhats.errors import AdapterRejectedError
from manyhats.types import DEFAULT_TENANT


@pytest.mark.parametrize("route", ["complete", "chat"])
def test_a_composition_is_worn_and_named(route):
    api = Api()
    answer = getattr(api, route)(adapter={"weighted": {"pirate": 0.7, "haiku@1": 0.25}})
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-manyhats-served-by"] == "weighted(pirate@2:0.7,haiku@1:0.25)"
    assert answer.json()["model"] == "org/base"
    [request] = api.engine.requests
    members = [str(m) for m in request.adapter.composition.members]
    assert (members, request.adapter.composition.weights) == (["pirate@2", "haiku@1"], (0.7, 0.25))


@pytest.mark.parametrize("members", [["pirate", "org/base"], {"pirate": 3, "org/base": 1}])
def test_an_ensemble_may_have_the_base_among_its_members(members):
    api = Api()
    answer = api.complete(adapter={"ensemble": members}, echo=True)
    assert answer.status_code == 200, answer.text
    shown = "pirate@2,org/base" if isinstance(members, list) else "pirate@2:3,org/base:1"
    assert answer.headers["x-manyhats-served-by"] == f"ensemble({shown})"
    [request] = api.engine.requests
    assert [None if lane is None else str(lane) for lane in request.adapter.lanes] == [
        None, "pirate@2",
    ]  # fmt: skip
    usage = answer.json()["usage"]
    assert usage["prompt_tokens"] == len(request.prompt_token_ids), "counted once"


def test_an_ensembles_prompt_is_not_scored():
    api = Api()
    answer = api.complete(adapter={"ensemble": ["pirate", "haiku"]}, echo=True, logprobs=1)
    assert_error(answer, 400, "invalid_request", "echo", "not served for an ensemble")
    assert api.engine.requests == []


def test_a_stack_streams():
    api = Api()
    answer = api.chat(adapter={"stack": ["haiku", "pirate@1"]}, stream=True)
    assert answer.headers["x-manyhats-served-by"] == "stack(haiku@1,pirate@1)"
    assert "data: [DONE]" in answer.text


def test_null_is_as_if_left_out():
    assert Api().chat(adapter=None).headers["x-manyhats-served-by"] == "baseline"


BAD = {
    "a name": ("pirate", "adapter", "stack or weighted or ensemble"),
    "two kinds": ({"stack": ["pirate"], "weighted": {}}, "adapter", "one field"),
    "another kind": ({"sum": ["pirate"]}, "adapter.sum", "unknown field"),
    "neither form": ({"ensemble": "pirate"}, "adapter.ensemble", "a list of names or an object"),
    "no weight": ({"ensemble": {"pirate": 0}}, "adapter.ensemble.pirate", "over 0"),
    "no member": ({"ensemble": []}, "adapter.ensemble", "1 to 8"),
    "a member twice": ({"ensemble": ["haiku", "haiku@1"]}, "adapter.ensemble[1]", "named twice"),
    "no list": ({"stack": {"pirate": 1}}, "adapter.stack", "a list of names"),
    "no object": ({"weighted": ["pirate"]}, "adapter.weighted", "an object"),
    "empty": ({"stack": []}, "adapter.stack", "1 to 8"),
    "too many": ({"stack": ["pirate"] * 9}, "adapter.stack", "1 to 8"),
    "no string": ({"stack": ["pirate", 3]}, "adapter.stack[1]", "1 to 256"),
    "no number": ({"weighted": {"pirate": "1"}}, "adapter.weighted.pirate", "-100 to 100"),
    "a boolean": ({"weighted": {"pirate": True}}, "adapter.weighted.pirate", "-100 to 100"),
    "too heavy": ({"weighted": {"pirate": -100.5}}, "adapter.weighted.pirate", "-100 to 100"),
    "twice": ({"stack": ["pirate", "pirate@2"]}, "adapter.stack[1]", "named twice"),
    "the base": ({"stack": ["org/base"]}, "adapter.stack[0]", "the base model"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_composition_names_the_field(case):
    value, param, words = BAD[case]
    api = Api()
    assert_error(api.chat(adapter=value), 400, "invalid_request", param, param, words)
    assert api.engine.requests == []


def test_an_unknown_member_is_a_404_that_names_it():
    answer = Api().chat(adapter={"weighted": {"pirate": 1, "haiki": 1}})
    assert_error(answer, 404, "model_not_found", "adapter.weighted.haiki", "near names: haiku")


def test_the_model_is_the_base():
    answer = Api().chat(model="pirate", adapter={"stack": ["haiku"]})
    assert_error(answer, 400, "invalid_request", "model", "'org/base'")
    answer = Api().chat(model="absent", adapter={"stack": ["haiku"]})
    assert_error(answer, 404, "model_not_found", "model", "absent")


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_cannot_compose_is_a_400(stream):
    api = Api()
    api.engine.error = AdapterRejectedError("cannot_compose", "at some site", param="adapter")
    api.engine.error_after = 0
    answer = api.chat(adapter={"stack": ["haiku", "pirate"]}, stream=stream)
    assert_error(answer, 400, "adapter_rejected", "adapter", "cannot_compose", "at some site")


@pytest.fixture
def client(tmp_path):
    with open_adapters(tmp_path / "home") as adapters:
        for seed, name in enumerate("ab"):
            folder = write_adapter(adapters.root / name, seed)
            adapters.service.register_folder(name, str(folder), tenant=DEFAULT_TENANT)
        api = Api(directory=adapters.service, routers=(admin.router,))
        yield TestClient(api.app, client=("127.0.0.1", 1))


def test_a_composition_is_registered_shown_and_deleted(client):
    body = {"name": "mix", "composition": {"stack": ["a", "b@1"]}}
    answer = client.post("/admin/adapters", json=body)
    assert answer.status_code == 201, answer.text
    shown = answer.json()
    assert (shown["name"], shown["version"], shown["family"]) == ("mix", 1, "stack")
    assert shown["composition"] == {"stack": ["a@1", "b@1"]}
    assert client.get("/admin/adapters/mix").json()["versions"][0]["source"] == "stack(a@1,b@1)"
    listed = client.get("/admin/adapters").json()["data"]
    assert [(c["name"], "composition" in c) for c in listed] == [
        ("a", False), ("b", False), ("mix", True),
    ]  # fmt: skip
    refused = client.delete("/admin/adapters/a")
    assert_error(refused, 409, "conflict", "name", "mix@1")
    assert client.delete("/admin/adapters/mix").status_code == 200
    assert client.delete("/admin/adapters/a").status_code == 200


def test_a_registration_names_one_source(client):
    for body in ({"name": "x"}, {"name": "x", "path": "/", "composition": {"stack": ["a"]}}):
        answer = client.post("/admin/adapters", json=body)
        assert_error(answer, 400, "invalid_request", "path", "one of path, composition and source")
    answer = client.post("/admin/adapters", json={"name": "x", "composition": {"stack": ["z"]}})
    assert_error(answer, 404, "model_not_found", "composition.stack[0]")
