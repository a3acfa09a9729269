"""Every bad input is a 4xx in OpenAI's shape that names the field and the bound."""

import json
import socket
from collections.abc import AsyncIterator

import orjson
import pytest
from fastapi import APIRouter, HTTPException, Request
from hypothesis import given, settings
from hypothesis import strategies as st
from support.api import Api, assert_error, serving, settings_of
from support.fake_engine import FakeEngine

from manyhats.api.schemas import ChatRequest, CompletionRequest

USER = [{"role": "user", "content": "x"}]
PATHS = ("/v1/completions", "/v1/chat/completions")


def refused(response, param, *words, code="invalid_request", status=400):
    return assert_error(response, status, code, param, *words)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"nope": 1}, "nope", ("nope", "unknown field")),
        ({"model": 5}, "model", ("string",)),
        ({"model": ""}, "model", ("1 character",)),
        ({"model": "m" * 257}, "model", ("256",)),
        ({"temperature": -0.1}, "temperature", ("temperature", "greater than or equal to 0")),
        ({"temperature": 2.1}, "temperature", ("less than or equal to 2",)),
        ({"temperature": "1"}, "temperature", ("number",)),
        ({"temperature": True}, "temperature", ("number",)),
        ({"top_p": 0}, "top_p", ("greater than 0",)),
        ({"top_p": 1.01}, "top_p", ("less than or equal to 1",)),
        ({"top_k": -2}, "top_k", ("-1",)),
        ({"top_k": 1.5}, "top_k", ("integer",)),
        ({"top_k": 2**31}, "top_k", ("2147483647",)),
        ({"min_p": 1.5}, "min_p", ("1",)),
        ({"frequency_penalty": 2.5}, "frequency_penalty", ("2",)),
        ({"presence_penalty": -2.5}, "presence_penalty", ("-2",)),
        ({"repetition_penalty": 0}, "repetition_penalty", ("greater than 0",)),
        ({"repetition_penalty": 11}, "repetition_penalty", ("10",)),
        ({"n": 0}, "n", ("1",)),
        ({"n": 5}, "n", ("5", "bound is 4")),
        ({"n": 10**18}, "n", ("bound is 4",)),
        ({"n": "2"}, "n", ("integer",)),
        ({"max_tokens": -1}, "max_tokens", ("0",)),
        ({"max_tokens": 1.0}, "max_tokens", ("integer",)),
        ({"max_tokens": True}, "max_tokens", ("integer",)),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens", ("6", "5")),
        ({"seed": 2**63}, "seed", ("less than 9223372036854775808",)),
        ({"seed": "1"}, "seed", ("integer",)),
        ({"stop": ["a"] * 4}, "stop", ("4", "bound is 3")),
        ({"stop": [""]}, "stop[0]", ("1 to 256",)),
        ({"stop": "s" * 257}, "stop", ("257", "256")),
        ({"stop": ["a", 1]}, "stop[1]", ("string",)),
        ({"stop": {"a": 1}}, "stop", ("string",)),
        ({"stop_token_ids": [300]}, "stop_token_ids", ("300", "vocabulary of 300")),
        ({"stop_token_ids": [-1]}, "stop_token_ids", ("-1",)),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids", ("65", "64")),
        ({"stop_token_ids": ["a"]}, "stop_token_ids[0]", ("integer",)),
        ({"logit_bias": {"300": 1}}, "logit_bias", ("300",)),
        ({"logit_bias": {"a": 1}}, "logit_bias", ("'a'",)),
        ({"logit_bias": {"-1": 1}}, "logit_bias", ("'-1'",)),
        ({"logit_bias": {"٣": 1}}, "logit_bias", ("token id",)),
        ({"logit_bias": {"9" * 400: 1}}, "logit_bias", ("token id",)),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", ("-100 to 100",)),
        ({"logit_bias": {"1": "x"}}, "logit_bias.1", ("number",)),
        ({"logit_bias": {"1": True}}, "logit_bias.1", ("number",)),
        ({"logit_bias": {"1": 1, "01": 2}}, "logit_bias", ("twice",)),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", ("1025", "1024")),
        ({"logit_bias": [1]}, "logit_bias", ("object",)),
        ({"ignore_eos": 1}, "ignore_eos", ("boolean",)),
        ({"stream": "true"}, "stream", ("boolean",)),
        ({"stream_options": {"include_usage": True}}, "stream_options", ("stream",)),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", ("unknown field",)),
        ({"metadata": {"k": 1}}, "metadata.k", ("string",)),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", ("16",)),
        ({"metadata": {"k": "v" * 513}}, "metadata.k", ("512",)),
        ({"store": True}, "store", ("not supported",)),
        ({"service_tier": "flex"}, "service_tier", ("auto", "default")),
        ({"user": 1}, "user", ("string",)),
    ],
)  # fmt: skip
def test_fields_that_both_routes_share(fields, param, words):
    api = Api()
    refused(api.complete(**fields), param, *words)
    refused(api.chat(**fields), param, *words)
    assert api.engine.requests == []


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": None}, "prompt", ("string",)),
        ({"prompt": ""}, "prompt", ("empty",)),
        ({"prompt": []}, "prompt", ("empty",)),
        ({"prompt": [[]]}, "prompt", ("empty",)),
        ({"prompt": [""]}, "prompt", ("empty",)),
        ({"prompt": 5}, "prompt", ("string",)),
        ({"prompt": {"a": 1}}, "prompt", ("string",)),
        ({"prompt": [1, "a"]}, "prompt[1]", ("token id",)),
        ({"prompt": [1, True]}, "prompt[1]", ("token id",)),
        ({"prompt": [1.5]}, "prompt[0]", ("list of token ids",)),
        ({"prompt": ["a", 1]}, "prompt[1]", ("string",)),
        ({"prompt": [[1], [2, "b"]]}, "prompt[1][1]", ("token id",)),
        ({"prompt": [[1], "b"]}, "prompt[1]", ("token ids",)),
        ({"prompt": [300]}, "prompt", ("300", "vocabulary")),
        ({"prompt": [-1]}, "prompt", ("-1",)),
        ({"prompt": ["a"] * 65}, "prompt", ("65", "bound is 64")),
        ({"max_tokens": 0}, "max_tokens", ("echo",)),
        ({"logprobs": 6}, "logprobs", ("6", "bound is 5")),
        ({"logprobs": -1}, "logprobs", ("0",)),
        ({"logprobs": True}, "logprobs", ("integer",)),
        ({"best_of": 2}, "best_of", ("n (1)",)),
        ({"suffix": "x"}, "suffix", ("not supported",)),
        ({"echo": "yes"}, "echo", ("boolean",)),
        ({"messages": USER}, "messages", ("unknown field",)),
        ({"response_format": {"type": "text"}}, "response_format", ("unknown field",)),
    ],
)
def test_fields_of_completions(fields, param, words):
    api = Api()
    refused(api.complete(**fields), param, *words)
    assert api.engine.requests == []


def test_more_choices_than_the_queue_could_ever_hold():
    api = Api(settings=settings_of(max_queue=7))
    assert api.complete(prompt=["a"] * 3, n=2).status_code == 200
    refused(api.complete(prompt=["a"] * 4, n=2), "prompt", "4 prompts", "n 2", "7")


def _parts(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}]}


IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", ("1",)),
        ({"messages": "hi"}, "messages", ("list",)),
        ({"messages": [{"content": "x"}]}, "messages[0].role", ("required",)),
        ({"messages": [{"role": "user"}]}, "messages[0].content", ("required",)),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", ("string",)),
        ({"messages": [*USER, {"role": "tool", "content": "x"}]}, "messages[1].role", ("'user'",)),
        ({"messages": [{"role": "user", "content": "x", "name": "bob"}]}, "messages[0].name",
         ("not supported",)),
        ({"messages": [{"role": "user", "content": "x", "x": 1}]}, "messages[0].x", ("unknown",)),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
         "messages[0].tool_calls", ("not supported",)),
        (_parts(), "messages[0].content", ("non-empty",)),
        (_parts(IMAGE), "messages[0].content[0].type", ("'text'",)),
        (_parts({"type": "text", "text": "a"}, {"type": "input_audio"}),
         "messages[0].content[1].type", ("'text'",)),
        (_parts({"type": "text"}), "messages[0].content[0].text", ("string",)),
        (_parts({"type": "text", "text": "a", "x": 1}), "messages[0].content[0].x", ("unknown",)),
        (_parts("a"), "messages[0].content[0]", ("object",)),
        ({"logprobs": 1}, "logprobs", ("boolean",)),
        ({"top_logprobs": 1}, "top_logprobs", ("logprobs",)),
        ({"top_logprobs": 6, "logprobs": True}, "top_logprobs", ("6", "bound is 5")),
        ({"max_completion_tokens": 0}, "max_completion_tokens", ("1",)),
        ({"tools": [{"type": "function"}]}, "tools", ("not supported",)),
        ({"tool_choice": "required"}, "tool_choice", ("none", "auto")),
        ({"functions": [{}]}, "functions", ("not supported",)),
        ({"function_call": {"name": "f"}}, "function_call", ("not supported",)),
        ({"modalities": ["text", "audio"]}, "modalities", ("not supported",)),
        ({"audio": {}}, "audio", ("not supported",)),
        ({"prediction": {}}, "prediction", ("not supported",)),
        ({"reasoning_effort": "low"}, "reasoning_effort", ("not supported",)),
        ({"web_search_options": {}}, "web_search_options", ("not supported",)),
        ({"chat_template": "{{ x }}"}, "chat_template", ("not accepted from a request",)),
        ({"chat_template_kwargs": {}}, "chat_template_kwargs", ("not accepted from a request",)),
        ({"echo": True}, "echo", ("unknown field",)),
        ({"best_of": 1}, "best_of", ("unknown field",)),
        ({"prompt": "x"}, "prompt", ("unknown field",)),
    ],
)  # fmt: skip
def test_fields_of_chat(fields, param, words):
    api = Api()
    refused(api.chat(**fields), param, *words)
    assert api.engine.requests == []


def test_too_many_messages():
    api = Api(settings=settings_of(max_body_kb=64))
    refused(api.chat(messages=USER * 1025), "messages", "1024")


def test_defaults_that_clients_send_are_accepted():
    response = Api().chat(
        tools=[], tool_choice="auto", functions=None, parallel_tool_calls=True, modalities=["text"],
        function_call="none", store=False, service_tier="default", verbosity="medium",
    )  # fmt: skip
    assert response.status_code == 200


def test_several_problems_are_named_and_their_number_is_bounded():
    error = refused(Api().complete(**{f"x{i}": 1 for i in range(50)}), "x0", "46 more")
    assert "x3" in error["message"]
    assert "x4" not in error["message"]
    long = refused(Api().complete(**{"y" * 9000: 1}), "y" * 197 + "...")
    assert len(long["message"]) < 300


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", ("empty",)),
        (b"  \n", ("empty",)),
        (b"{", ("not valid JSON",)),
        (b'{"temperature": NaN}', ("not valid JSON",)),
        (b'{"temperature": Infinity}', ("not valid JSON",)),
        (b'{"temperature": -Infinity}', ("not valid JSON",)),
        (b'{"temperature": 1e400}', ("not valid JSON",)),
        (b'{"seed": ' + b"9" * 5000 + b"}", ("not valid JSON",)),
        (b'{"prompt": "\xff\xfe"}', ("not valid JSON",)),
        (b'{"prompt": "\xed\xa0\x80"}', ("not valid JSON",)),
        (b'{"prompt": "\\ud800"}', ("not valid JSON",)),
        (b"\xef\xbb\xbf{}", ("not valid JSON",)),
        (b"[]", ("object", "array")),
        (b'"x"', ("object", "string")),
        (b"null", ("object", "null")),
        (b"3", ("object", "number")),
        (b"true", ("object", "boolean")),
        (b"[" * 5000, ("not valid JSON",)),
        (b'{"a":' * 1000 + b"1" + b"}" * 1000, ("nested too deeply",)),
    ],
)
def test_bodies_that_are_not_json(body, words):
    api = Api()
    for path in PATHS:
        refused(api.post(path, body), None, *words)


def test_a_key_given_twice():
    body = b'{"model": "org/base", "prompt": "x", "max_tokens": 1, "max_tokens": 2}'
    refused(Api().post(PATHS[0], body), "max_tokens", "twice")
    body = b'{"model": "org/base", "prompt": "x", "logit_bias": {"1": 1, "1": 2}}'
    refused(Api().post(PATHS[0], body), "1", "twice")


def test_a_huge_integer_is_no_integer():
    body = b'{"model": "org/base", "prompt": "x", "seed": 99999999999999999999999}'
    refused(Api().post(PATHS[0], body), "seed", "integer")


def _chunked(*parts: bytes) -> AsyncIterator[bytes]:
    async def stream() -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    return stream()


def test_a_body_over_the_bound_is_a_413_whichever_way_it_comes():
    api = Api()
    bound = 16 * 1024
    head = b'{"model": "org/base", "prompt": "'
    fits = head + b"a" * (bound - len(head) - 2) + b'"}'
    assert len(fits) == bound
    refused(api.post(PATHS[0], fits), "prompt", code="context_length_exceeded")
    refused(
        api.post(PATHS[0], fits + b" "), None, "16385", "16384", code="body_too_large", status=413
    )
    plain = {"content-type": "application/json"}
    half = b"a" * (bound // 2)
    chunked = api.send("POST", PATHS[0], content=_chunked(half, half, b"b"), headers=plain)
    refused(chunked, None, "16384", code="body_too_large", status=413)
    assert chunked.headers["connection"] == "close"
    ok = api.send("POST", PATHS[0], content=_chunked(fits[:99], fits[99:]), headers=plain)
    refused(ok, "prompt", code="context_length_exceeded")


def test_what_is_on_its_way_is_read_and_thrown_away_after_the_refusal():
    """Closing with unread bytes would reset the connection and take the answer with it."""
    read = []

    async def parts() -> AsyncIterator[bytes]:
        for i in range(5):
            read.append(i)
            yield b"x" * 10_000

    headers = {"content-type": "application/json", "content-length": "50000"}
    response = Api().send("POST", PATHS[0], content=parts(), headers=headers)
    refused(response, None, "50000", "16384", code="body_too_large", status=413)
    assert read == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "sent", [b"text/plain", b"", b"multipart/form-data; boundary=x", b"application/jsonx"]
)
def test_another_content_type_is_a_415(sent):
    response = Api().post(PATHS[1], b"{}", headers={"content-type": sent})
    refused(
        response, "content-type", "application/json", code="unsupported_content_type", status=415
    )


@pytest.mark.parametrize("sent", ["application/json; charset=utf-8", "Application/JSON"])
def test_json_in_other_spellings(sent):
    body = orjson.dumps({"model": "org/base", "prompt": "x"})
    assert Api().post(PATHS[0], body, headers={"content-type": sent}).status_code == 200


def _upload_api() -> Api:
    router = APIRouter()

    @router.post("/admin/adapters")
    async def upload(request: Request) -> dict[str, int]:
        return {"bytes": len(await request.body())}

    @router.post("/admin/form")
    async def form(request: Request) -> dict[str, int]:
        try:
            return {"bytes": len(await request.body())}
        except Exception as error:  # as form parsers do
            raise HTTPException(400, "There was an error parsing the body") from error

    return Api(routers=[router])


def test_an_upload_has_a_bound_of_its_own():
    api = _upload_api()
    multipart = {"content-type": "multipart/form-data; boundary=b"}
    bound = 2 << 20  # the adapter's MiB and the slack
    at_bound = api.send("POST", "/admin/adapters", content=b"x" * bound, headers=multipart)
    assert at_bound.json() == {"bytes": bound}
    for body in (b"x" * (bound + 1), _chunked(b"x" * bound, b"y")):
        response = api.send("POST", "/admin/adapters", content=body, headers=multipart)
        refused(response, None, str(bound), code="body_too_large", status=413)
    as_json = api.send(
        "POST",
        "/admin/adapters",
        content=b"x" * 17_000,
        headers={"content-type": "application/json"},
    )
    refused(as_json, None, "16384", code="body_too_large", status=413)
    plain = api.send("POST", "/admin/adapters", content=b"x", headers={"content-type": "a/b"})
    refused(
        plain, "content-type", "multipart/form-data", code="unsupported_content_type", status=415
    )


def test_the_413_cannot_be_turned_into_something_else_by_the_route():
    body = _chunked(b"x" * 10_000, b"y" * 10_000)
    headers = {"content-type": "application/json"}
    response = _upload_api().send("POST", "/admin/form", content=body, headers=headers)
    refused(response, None, "16384", code="body_too_large", status=413)


def test_on_a_socket_a_body_over_the_bound_is_refused_before_it_is_sent():
    """Ten gigabytes are announced, none is sent: the answer comes, the connection is closed."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with (
        serving(Api().app) as address,
        socket.create_connection(address, timeout=30) as connection,
    ):
        connection.sendall(head + b"Content-Length: 10000000000\r\n\r\n")
        answer = _read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"over the bound of 16384 bytes" in answer


def test_on_a_socket_a_body_that_says_no_length_is_cut_off():
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with (
        serving(Api().app) as address,
        socket.create_connection(address, timeout=30) as connection,
    ):
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        connection.sendall(b"4001\r\n" + b" " * 0x4001 + b"\r\n")
        answer = _read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 413 ")


def _read_to_end(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
    ],
)
def test_routes_that_are_not_there(method, path, status, code):
    assert_error(Api().send(method, path), status, code, None)


def test_a_defect_in_a_route_is_a_500_in_our_shape():
    router = APIRouter()

    @router.get("/broken")
    async def broken() -> None:
        raise RuntimeError("a secret")

    @router.get("/typed/{number}")
    async def typed(number: int) -> int:
        return number

    api = Api(routers=[router])
    response = api.get("/broken", headers={"x-request-id": "mine"})
    assert_error(response, 500, "internal_error", None)
    assert response.headers["x-request-id"] == "mine"
    assert "secret" not in response.text
    refused(api.get("/typed/x"), "number", "integer")
    assert api.get("/typed/5").json() == 5


FIELDS = sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields, "role", "extra"})
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False),
    st.text(max_size=20), st.sampled_from(["org/base", "pirate", "user", "text", "json_schema"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.dictionaries(st.one_of(st.sampled_from(FIELDS), st.text(max_size=5)), inner, max_size=4),
    ),
    max_leaves=12,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "tool"]), "content": VALUES}
    ),
    max_size=3,
)
PROBABLE = st.fixed_dictionaries(
    {"model": st.sampled_from(["org/base", "pirate", "haiku@1", "nope"])},
    optional={
        "prompt": st.one_of(st.text(max_size=300), VALUES),
        "messages": st.one_of(MESSAGES, VALUES),
        "max_tokens": st.integers(-1, 300),
        "n": st.integers(-1, 6),
        "temperature": st.floats(-1, 3),
        "stop": VALUES,
        "logprobs": st.one_of(st.booleans(), st.integers(-1, 7)),
        "echo": st.booleans(),
        "stream": st.booleans(),
        "seed": st.integers(-(2**64), 2**64),
        "logit_bias": st.dictionaries(st.integers(-5, 400).map(str), st.floats(-200, 200)),
        "response_format": VALUES,
        "stream_options": VALUES,
    },
)
API = Api(engine=FakeEngine())


@settings(max_examples=250)
@given(path=st.sampled_from(PATHS), body=st.one_of(PROBABLE, VALUES), cut=st.integers(0, 40))
def test_no_json_body_is_ever_a_500(path, body, cut):
    data = json.dumps(body).encode()
    if cut < 3:
        data = data[: len(data) - cut]
    response = API.post(path, data)
    assert response.status_code in (200, 400, 404, 413), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "code", "param"}
        assert error["message"]
    else:
        assert "internal_error" not in response.text
    assert API.engine.live == 0


@settings(max_examples=100)
@given(path=st.sampled_from(PATHS), body=st.binary(max_size=200))
def test_no_bytes_are_ever_a_500(path, body):
    assert API.post(path, body).status_code == 400
