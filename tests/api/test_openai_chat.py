"""/v1/chat/completions, not streamed."""

import json

import pytest
from support.api import Api, assert_error, settings_of
from support.fake_engine import BOS, ByteTokenizer, FakeEngine, logprob_of

from manyhats.types import GrammarKind


def test_the_whole_shape():
    api = Api()
    response = api.chat(seed=7)
    body = response.json()
    assert response.headers["x-manyhats-served-by"] == "baseline"
    assert body.pop("id").startswith("chatcmpl-")
    assert body.pop("created") >= 1_700_000_000
    assert body == {
        "object": "chat.completion",
        "model": "org/base",
        "system_fingerprint": "fp_abababababab",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "base #7 é!", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": len("u:Hi\na:"),
            "completion_tokens": 12,
            "total_tokens": 19,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    }


def test_the_template_is_rendered_and_encoded_without_special_tokens():
    api = Api(engine=FakeEngine(tokenizer=ByteTokenizer(bos=True)))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "d"},
    ]
    assert api.chat(messages=messages).status_code == 200
    tokens = api.engine.requests[0].prompt_token_ids
    assert bytes(tokens) == b"s:Be brief.\nu:a\nb\na:c\nu:d\na:"
    assert BOS not in tokens


def test_a_template_that_refuses_is_the_callers_mistake():
    response = Api().chat(messages=[{"role": "assistant", "content": "x"}])
    assert_error(response, 400, "invalid_request", "messages", "must not be the assistant's")


def test_logprobs_with_alternatives():
    body = Api().chat(logprobs=True, top_logprobs=2, seed=0, max_tokens=9).json()
    shown = body["choices"][0]["logprobs"]
    assert set(shown) == {"content", "refusal"}
    assert shown["refusal"] is None
    first, last = shown["content"][0], shown["content"][-1]
    assert first == {
        "token": "b",
        "logprob": logprob_of(98),
        "bytes": [98],
        "top_logprobs": [
            {"token": "\ufffd", "logprob": -0.25, "bytes": [0xC3]},
            {"token": "c", "logprob": -0.5, "bytes": [99]},
        ],
    }
    assert (last["token"], last["bytes"]) == ("\ufffd", [0xC3])
    assert len(shown["content"]) == body["usage"]["completion_tokens"] == 9


@pytest.mark.parametrize("top", [None, 0])
def test_logprobs_of_the_chosen_tokens_alone(top):
    body = Api().chat(logprobs=True, top_logprobs=top, max_tokens=2, seed=0).json()
    assert [entry["top_logprobs"] for entry in body["choices"][0]["logprobs"]["content"]] == [
        [],
        [],
    ]


def test_logprobs_false_is_none():
    assert Api().chat(logprobs=False).json()["choices"][0]["logprobs"] is None


def test_n_choices():
    body = Api().chat(n=3, seed=5).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in body["choices"]}) == 3


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 32),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6}, 6),
        ({"max_completion_tokens": 6, "max_tokens": 6}, 6),
        ({"max_tokens": 193}, 193),
        ({"messages": [{"role": "user", "content": "a" * 190}]}, 200 - 195),
    ],
)
def test_max_tokens(fields, expected):
    api = Api()
    assert api.chat(**fields).status_code == 200
    assert api.engine.requests[0].params[0].max_tokens == expected


@pytest.mark.parametrize(
    ("fields", "code", "param", "words"),
    [
        ({"max_tokens": 194}, "context_length_exceeded", "max_tokens", ("194", "200", "193")),
        ({"max_completion_tokens": 194}, "context_length_exceeded",
         "max_completion_tokens", ("193",)),
        ({"max_completion_tokens": 5, "max_tokens": 6}, "invalid_request",
         "max_completion_tokens", ("5", "6")),
        ({"max_tokens": 0}, "invalid_request", "max_tokens", ("at least 1",)),
        ({"messages": [{"role": "user", "content": "a" * 195}]}, "context_length_exceeded",
         "messages", ("200 tokens", "199")),
    ],
)  # fmt: skip
def test_max_tokens_that_do_not_fit(fields, code, param, words):
    assert_error(Api().chat(**fields), 400, code, param, *words)


def test_a_json_schema_reaches_the_grammar_and_the_engine_in_its_own_order():
    api = Api()
    schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    assert api.chat(response_format=wanted).status_code == 200
    grammar = api.engine.requests[0].params[0].grammar
    assert api.grammar.seen == [grammar]
    assert grammar.kind is GrammarKind.JSON_SCHEMA
    assert grammar.schema == (
        '{"type":"object","properties":{"b":{"type":"string"},"a":{"type":"integer"}}}'
    )


def test_a_schema_that_cannot_be_enforced():
    api = Api()
    schema = {"name": "n", "schema": {"title": "impossible"}}
    response = api.chat(response_format={"type": "json_schema", "json_schema": schema})
    assert_error(response, 400, "invalid_request", "response_format", "cannot be enforced")
    assert api.engine.requests == []


@pytest.mark.parametrize(
    ("kind", "grammar"), [("json_object", GrammarKind.JSON_OBJECT), ("text", None)]
)
def test_the_other_response_formats(kind, grammar):
    api = Api()
    assert api.chat(response_format={"type": kind}).status_code == 200
    found = api.engine.requests[0].params[0].grammar
    assert (found and found.kind) == grammar


@pytest.mark.parametrize(
    ("wanted", "param"),
    [
        ({"type": "regex"}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_object", "json_schema": {"name": "n", "schema": {}}},
         "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "n"}},
         "response_format.json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
         "response_format.json_schema.name"),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": True}},
         "response_format.json_schema.schema"),
        ("json", "response_format"),
    ],
)  # fmt: skip
def test_response_formats_that_are_refused(wanted, param):
    assert_error(Api().chat(response_format=wanted), 400, "invalid_request", param)


def test_a_schema_nested_too_deeply_or_too_long():
    deep: dict[str, object] = {}
    for _ in range(300):
        deep = {"items": deep}
    for schema, word in ((deep, "nested"), ({"title": "x" * 70_000}, "65536")):
        api = Api(settings=settings_of(max_body_kb=256))
        wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        messages = [{"role": "user", "content": "x"}]
        body = {"model": "org/base", "messages": messages, "response_format": wanted}
        response = api.post("/v1/chat/completions", json.dumps(body).encode())
        param = "response_format.json_schema.schema"
        assert_error(response, 400, "invalid_request", param, word)
