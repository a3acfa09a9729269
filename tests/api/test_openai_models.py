"""/v1/models, keys, and the description of the API."""

from pydantic import SecretStr
from support.api import Api, assert_error, settings_of


def test_the_list_has_the_base_and_every_version_by_a_name_that_resolves():
    api = Api()
    body = api.get("/v1/models").json()
    assert body["object"] == "list"
    assert [card["id"] for card in body["data"]] == ["org/base", "haiku", "pirate", "pirate@1"]
    assert {card["object"] for card in body["data"]} == {"model"}
    assert body["data"][0]["parent"] is None
    assert body["data"][2]["root"] == "pirate@2"
    for card in body["data"]:
        assert {"id", "object", "created", "owned_by"} <= set(card)
        assert api.get(f"/v1/models/{card['id']}").json() == card


def test_one_model_may_have_a_slash_and_a_version():
    api = Api()
    assert api.get("/v1/models/org/base").json()["max_model_len"] == 200
    card = api.get("/v1/models/pirate@1").json()
    assert (card["id"], card["root"], card["parent"]) == ("pirate@1", "pirate@1", "org/base")
    assert card["adapter"] == {
        "digest": "01" * 32, "family": "lora", "max_rank": 8, "bytes": 4096,
    }  # fmt: skip


def test_an_unknown_model_is_a_404_with_near_names():
    api = Api()
    for response in (
        api.get("/v1/models/pirat"), api.complete(model="pirat"), api.chat(model="pirat"),
    ):  # fmt: skip
        error = assert_error(response, 404, "model_not_found", "model", "pirate")
        assert error["type"] == "not_found_error"
    assert api.engine.requests == []


def test_a_key_is_asked_for_where_one_is_set():
    api = Api(settings=settings_of(api_keys=(SecretStr("user-key"),)))
    for response in (
        api.get("/v1/models"),
        api.get("/v1/models/pirate"),
        api.complete(),
        api.chat(),
    ):
        assert_error(response, 401, "invalid_api_key", None)
        assert response.headers["www-authenticate"] == "Bearer"
    wrong = {"authorization": "Bearer nope"}
    assert_error(api.get("/v1/models", headers=wrong), 401, "invalid_api_key", None)
    right = {"authorization": "Bearer user-key"}
    assert api.get("/v1/models", headers=right).status_code == 200
    assert api.complete(headers=right).status_code == 200
    assert api.get("/healthz").status_code == 200


def test_the_description_has_the_bodies_in_one_piece():
    description = Api().get("/openapi.json").json()
    for path, field in (("/v1/completions", "prompt"), ("/v1/chat/completions", "messages")):
        content = description["paths"][path]["post"]["requestBody"]["content"]
        schema = content["application/json"]["schema"]
        assert field in schema["required"]
        assert schema["additionalProperties"] is False
        assert schema["properties"]["temperature"]["anyOf"][0]["maximum"] == 2
        assert "$ref" not in str(schema)


def test_the_request_id_is_the_callers_where_it_is_sane():
    api = Api()
    for sane in ("abc", "A.b_c:d-1", "x" * 128):
        response = api.complete(headers={"x-request-id": sane})
        assert response.headers["x-request-id"] == sane
    for odd in ("x" * 129, "a b", "a/b", "é".encode(), ""):
        response = api.complete(headers={"x-request-id": odd})
        made = response.headers["x-request-id"]
        assert len(made) == 32
        assert made.isalnum()
    ids = [request.request_id for request in api.engine.requests]
    assert len(set(ids)) == len(ids)  # the engine's ids are never the caller's
