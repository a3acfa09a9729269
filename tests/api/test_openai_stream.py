"""Streaming: chunk shapes, the whole answer in pieces, failures, clients that leave."""

import asyncio
from itertools import chain

import orjson
import pytest
from support.api import Api, assert_error, events
from support.fake_engine import FakeEngine

from manyhats.errors import AdapterLoadError, DrainingError, EngineFailedError, QueueFullError
from manyhats.types import FinishReason, OutputDelta


def test_chat_chunks():
    response = Api().chat(stream=True, seed=7, max_tokens=3)
    *chunks, done = events(response)
    assert done == "[DONE]"
    assert response.headers["x-manyhats-served-by"] == "baseline"
    assert response.headers["cache-control"] == "no-cache"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    assert {chunk["system_fingerprint"] for chunk in chunks} == {"fp_abababababab"}
    assert all("usage" not in chunk for chunk in chunks)
    assert [chunk["choices"][0] for chunk in chunks] == [
        {"index": 0, "delta": {"role": "assistant", "content": "", "refusal": None},
         "logprobs": None, "finish_reason": None},
        *({"index": 0, "delta": {"content": c}, "logprobs": None, "finish_reason": None}
          for c in "bas"),
        {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"},
    ]  # fmt: skip


@pytest.mark.parametrize("chat", [False, True])
def test_usage_comes_last_and_is_null_before(chat):
    api = Api()
    call = api.chat if chat else api.complete
    options = {"stream": True, "stream_options": {"include_usage": True}, "seed": 1}
    *chunks, usage, done = events(call(**options))
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"] == call(seed=1).json()["usage"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"logprobs": 2},
        {"echo": True},
        {"echo": True, "logprobs": 1},
        {"echo": True, "logprobs": 1, "max_tokens": 0},
        {"echo": True, "max_tokens": 0},
        {"prompt": ["aé", [72, 105]], "n": 2},
        {"prompt": [[1, 2], [3]], "n": 2, "echo": True, "logprobs": 1},
    ],
)
def test_streamed_completions_add_up_to_the_whole_answer(fields):
    fields = {"seed": 9, **fields}
    if isinstance(fields.get("prompt"), list) and isinstance(fields["prompt"][0], str):
        fields["prompt"] = ["aé", "Hi"]
    api = Api()
    whole = api.complete(**fields).json()
    *chunks, done = events(api.complete(stream=True, **fields))
    assert done == "[DONE]"
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in mine) == choice["text"]
        assert [p["finish_reason"] for p in mine if p["finish_reason"]] == [choice["finish_reason"]]
        shown = [piece["logprobs"] for piece in mine if piece["logprobs"]]
        joined = {key: [*chain(*(s[key] for s in shown))] for key in (shown[0] if shown else ())}
        assert (joined or None) == choice["logprobs"]
    assert all(chunk["object"] == "text_completion" for chunk in chunks)


def test_streamed_chat_adds_up_to_the_whole_answer():
    api = Api()
    fields = {"n": 2, "seed": 4, "logprobs": True, "top_logprobs": 1}
    whole = api.chat(**fields).json()
    *chunks, _ = events(api.chat(stream=True, **fields))
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        text = "".join(piece["delta"].get("content", "") for piece in mine)
        assert text == choice["message"]["content"]
        entries = [*chain(*(p["logprobs"]["content"] for p in mine if p["logprobs"]))]
        assert entries == choice["logprobs"]["content"]
        assert mine[0]["delta"]["role"] == "assistant"
        assert mine[-1] == {
            "index": choice["index"], "delta": {}, "logprobs": None, "finish_reason": "stop",
        }  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["one", ["one", "two"]])
@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (
            QueueFullError("the queue holds 1024, its bound", retry_after_s=1.2),
            429,
            "rate_limit_error",
        ),
        (DrainingError("shutting down"), 503, "server_error"),
    ],
)
def test_a_refusal_by_the_engine_keeps_its_status_streaming_or_not(
    stream, prompt, error, status, kind
):
    api = Api(engine=FakeEngine(refuse=error))
    response = api.complete(stream=stream, prompt=prompt)
    shown = assert_error(response, status, error.code, None, error.message)
    assert shown["type"] == kind
    assert response.headers.get("retry-after") == ("2" if status == 429 else None)


@pytest.mark.parametrize("prompt", ["one", ["one", "two"]])
def test_an_error_of_a_request_fails_it_whole(prompt):
    for error, status in ((EngineFailedError("step failed"), 500), (AdapterLoadError("gone"), 503)):
        api = Api(engine=FakeEngine(error=error))
        assert_error(api.complete(prompt=prompt), status, error.code, None, error.message)
        assert api.engine.live == 0


@pytest.mark.parametrize("call", ["chat", "complete"])
def test_an_error_in_mid_stream_is_an_event_and_the_end(call):
    api = Api(engine=FakeEngine(error=EngineFailedError("the step failed")))
    response = getattr(api, call)(stream=True)
    *chunks, last = events(response)
    assert response.status_code == 200
    assert chunks
    assert last == {
        "error": {
            "message": "the step failed", "type": "server_error", "code": "engine_failed",
            "param": None,
        }
    }  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_a_defect_says_nothing_of_its_inside(stream, caplog):
    api = Api(engine=FakeEngine(crash_after=2))
    response = api.complete(stream=stream, headers={"x-request-id": "abc"})
    error = events(response)[-1]["error"] if stream else response.json()["error"]
    assert response.status_code == (200 if stream else 500)
    assert (error["code"], error["type"]) == ("internal_error", "server_error")
    assert "secret" not in response.text
    assert "secret" in caplog.text


@pytest.mark.parametrize("fault", [{"vanish_after": 2}, {"abort_after": 2}])
def test_an_answer_that_is_not_whole_is_never_a_success(fault):
    api = Api(engine=FakeEngine(**fault))
    assert_error(api.complete(), 500, "engine_failed", None)
    assert events(api.complete(stream=True))[-1]["error"]["code"] == "engine_failed"


def test_an_iterator_that_is_no_generator_is_closed_too():
    closed = []

    class Aborted:
        def __init__(self, request):
            self.delta = OutputDelta(request.request_id, 0, finish_reason=FinishReason.ABORT)

        def __aiter__(self):
            return self

        async def __anext__(self):
            return self.delta

        async def aclose(self):
            closed.append(self.delta.request_id)

    api = Api()
    api.engine.generate = Aborted
    assert_error(api.complete(), 500, "engine_failed", None)
    assert len(closed) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("prompt", "count"), [("one", 1), (["one", "two", "three"], 3)])
def test_a_client_that_leaves_aborts_its_requests(stream, prompt, count):
    """The connection drops while the engine works: every iterator is closed on return."""

    async def run() -> Api:
        api = Api(engine=FakeEngine(hang_after=3, hanging=asyncio.Event()))
        body = {"model": "org/base", "prompt": prompt, "stream": stream}
        await _call_and_leave(api, orjson.dumps(body))
        return api

    api = asyncio.run(run())
    assert api.engine.live == 0
    assert len(api.engine.aborted) == count
    assert sorted(api.engine.aborted) == sorted(r.request_id for r in api.engine.requests)


def test_a_client_that_leaves_before_the_first_token():
    async def run() -> Api:
        api = Api(engine=FakeEngine(hanging=asyncio.Event()))

        async def stuck(request):
            api.engine.live += 1
            try:
                api.engine.hanging.set()
                await asyncio.Event().wait()
                yield
            finally:
                api.engine.live -= 1
                api.engine.aborted.append(request.request_id)

        api.engine.generate = stuck
        body = orjson.dumps({"model": "org/base", "prompt": "x", "stream": True})
        sent = await _call_and_leave(api, body)
        assert sent == []
        return api

    api = asyncio.run(run())
    assert (api.engine.live, len(api.engine.aborted)) == (0, 1)
    # nothing was answered: the metrics say that the client went away
    gone = 'manyhats_http_requests_total{method="POST",route="/v1/completions",status="499"}'
    assert api.series()[gone] == 1


async def _call_and_leave(api: Api, body: bytes) -> list[dict]:
    """Calls the application as a server does and drops the connection once the engine hangs."""
    sent: list[dict] = []
    inbox = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict:
        if inbox:
            return inbox.pop()
        await api.engine.hanging.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions",
        "query_string": b"", "root_path": "", "scheme": "http", "http_version": "1.1",
        "headers": [(b"content-type", b"application/json")], "client": None, "server": None,
    }  # fmt: skip
    await asyncio.wait_for(api.app(scope, receive, send), 30)
    return sent
