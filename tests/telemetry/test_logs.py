"""Log lines belong to their requests, say what was done, and never what was written."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from fastapi import APIRouter
from support.api import Api, assert_error, settings_of

from manyhats.config import LogFormat, LogLevel
from manyhats.errors import EngineFailedError
from manyhats.telemetry import logs

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
router = APIRouter()


@router.get("/v1/talk/{who}")
async def talk(who: str) -> str:
    await anyio.to_thread.run_sync(logging.getLogger("manyhats.test").info, "from a thread")
    logging.getLogger("manyhats.test").debug("quietly")
    return "done"


@router.get("/v1/break")
async def broken() -> None:
    raise RuntimeError("a defect")


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What is logged as JSON; everything as it was afterwards."""
    root, names = logging.getLogger(), ["", *logs.OURS, "httpx", "httpcore"]
    handlers = list(root.handlers)
    levels = {name: logging.getLogger(name).level for name in names}
    for handler in handlers:
        root.removeHandler(handler)  # basicConfig(force) would close pytest's own
    logs.set_up(LogLevel.INFO, LogFormat.JSON)
    out = io.StringIO()
    root.handlers[0].setStream(out)
    yield out
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def accessed(stream: io.StringIO) -> list[dict[str, Any]]:
    return [line for line in lines(stream) if line["logger"] == "manyhats.access"]


def test_the_access_line_says_who_asked_for_what_and_how_much(stream: io.StringIO) -> None:
    api = Api()
    given = {"x-request-id": "call-7", "traceparent": PARENT}
    answer = api.chat(model="pirate@1", max_tokens=5, headers=given)
    assert answer.headers["x-request-id"] == "call-7"
    assert answer.headers["traceparent"] == PARENT, "without a tracer the caller's own comes back"
    (line,) = accessed(stream)
    usage = answer.json()["usage"]
    assert usage["completion_tokens"] == 5
    assert line.pop("duration_ms") >= 0
    assert line.pop("time").endswith("Z")
    message = line.pop("message")
    assert message.startswith("POST /v1/chat/completions 200 duration_ms=")
    assert line == {
        "level": "info",
        "logger": "manyhats.access",
        "request_id": "call-7",
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
        "span_id": "b7ad6b7169203331",
        "method": "POST",
        "route": "/v1/chat/completions",
        "status": 200,
        "tenant": "default",
        "adapter": "pirate@1",
        "prompt_tokens": usage["prompt_tokens"],
        "output_tokens": 5,
    }


def test_a_streamed_answer_is_counted_to_its_end(stream: io.StringIO) -> None:
    assert Api().complete(stream=True, max_tokens=7).text.endswith("[DONE]\n\n")
    (line,) = accessed(stream)
    assert (line["adapter"], line["output_tokens"]) == ("baseline", 7)


def test_every_line_of_a_request_has_its_id_also_from_other_threads(stream: io.StringIO) -> None:
    api = Api(routers=[router])
    first = api.get("/v1/talk/secret-path").headers["x-request-id"]
    second = api.get("/v1/talk/b").headers["x-request-id"]
    logging.getLogger("manyhats.test").info("outside")
    own = [(line["message"].split(" ")[0], line.get("request_id")) for line in lines(stream)]
    assert own == [
        ("from", first),
        ("GET", first),
        ("from", second),
        ("GET", second),
        ("outside", None),
    ]
    assert first != second
    assert "secret-path" not in stream.getvalue(), "the route's template, never the path"


def test_a_defect_is_logged_with_its_traceback_and_the_answer_names_the_line(
    stream: io.StringIO,
) -> None:
    answer = Api(routers=[router]).get("/v1/break")
    assert_error(answer, 500, "internal_error", None)
    failed, access = lines(stream)
    assert failed["level"] == "error"
    assert "RuntimeError: a defect" in failed["exception"]
    assert failed["request_id"] == access["request_id"] == answer.headers["x-request-id"]
    assert access["status"] == 500


def test_refused_requests_have_their_line_without_a_tenant(stream: io.StringIO) -> None:
    api = Api(settings=settings_of(api_keys=("key",)))
    api.complete()
    api.complete(headers={"authorization": "Bearer key"}, max_tokens=0)
    first, second = accessed(stream)
    assert (first["status"], "tenant" in first, "adapter" in first) == (401, False, False)
    assert (second["status"], second["tenant"], "adapter" in second) == (400, "default", False)


def test_probes_are_logged_for_those_who_debug_alone(stream: io.StringIO) -> None:
    api = Api()
    api.get("/healthz")
    assert lines(stream) == []
    logs.set_level(LogLevel.DEBUG)
    api.get("/healthz")
    assert [line["route"] for line in accessed(stream)] == ["/healthz"]


def test_what_callers_write_is_never_logged(stream: io.StringIO) -> None:
    """Through every way in which a request can end, with everything logged."""
    logs.set_level(LogLevel.DEBUG)
    api, secret = Api(), "xyzzy-the-secret"
    api.complete(prompt=secret, max_tokens=9)
    api.complete(prompt=secret, stream=True)
    api.chat(messages=[{"role": "user", "content": secret}], max_tokens=2)
    api.chat(messages=[{"role": "nobody", "content": secret}])
    api.complete(prompt=secret * 500)
    api.complete(prompt=secret, stop=[secret] * 50)
    api.complete(prompt=secret, model=secret)
    api.complete(prompt=secret, user=secret, adapter={secret: secret})
    api.post("/v1/completions", b'{"prompt": "' + secret.encode())
    api.get(f"/{secret}", headers={"x-request-id": f"{secret} {secret}", "traceparent": secret})
    api.engine.error = EngineFailedError("the step failed")
    api.complete(prompt=secret)
    api.complete(prompt=secret, stream=True)
    api.engine.error, api.engine.crash_after = None, 2
    api.complete(prompt=secret)
    api.complete(prompt=secret, stream=True)
    assert len(accessed(stream)) == 14
    assert secret not in stream.getvalue()


def test_text_lines_end_with_the_request_and_carry_the_traceback_below() -> None:
    form = logs.TextFormatter("%(message)s")
    record = logging.LogRecord("manyhats", logging.INFO, "", 1, "hello %s", ("you",), None)
    assert form.format(record) == "hello you"
    from manyhats.telemetry.record import RequestRecord, enter

    async def within() -> str:
        enter(RequestRecord("r-1", "GET"))
        try:
            raise ValueError("bad")
        except ValueError as error:
            record.exc_info = (ValueError, error, error.__traceback__)
            return form.format(record)

    first, *rest = anyio.run(within).splitlines()
    assert first == "hello you [r-1]"
    assert rest[-1] == "ValueError: bad"


def test_what_utf8_cannot_carry_does_not_cost_the_line() -> None:
    # Not through a logger: pytest's own capture would hand the line on as it is.
    record = logging.LogRecord("manyhats", logging.INFO, "", 1, "lone \udc80 surrogate", (), None)
    setattr(record, logs.FIELDS, {"n": {1}})
    line = json.loads(logs.JsonFormatter().format(record).encode())
    assert (line["message"], line["n"]) == ("lone ? surrogate", "{1}")


def test_the_level_changes_at_run_time_for_our_own_loggers(stream: io.StringIO) -> None:
    api = Api(routers=[router])
    assert api.get("/admin/log-level").json() == {"level": "info"}
    api.get("/v1/talk/a")
    changed = api.send("PUT", "/admin/log-level", json={"level": "debug"})
    assert changed.json() == {"level": "debug"}
    assert api.get("/admin/log-level").json() == {"level": "debug"}
    api.get("/v1/talk/a")
    logging.getLogger("somebody.else").debug("their bytes")
    assert [line["message"] for line in lines(stream)].count("quietly") == 1
    assert "their bytes" not in stream.getvalue()
    api.send("PUT", "/admin/log-level", json={"level": "error"})
    before = len(lines(stream))
    api.get("/v1/talk/a")
    logging.getLogger("somebody.else").warning("quiet too")
    assert len(lines(stream)) == before
    wrong = api.send("PUT", "/admin/log-level", json={"level": "loud"})
    assert_error(wrong, 400, "invalid_request", "level", "'debug', 'info', 'warning' or 'error'")
