"""Liveness, readiness, version, metrics."""

import anyio
import pytest
from support.api import Api, settings_of
from support.fake_engine import FakeEngine

import manyhats
from manyhats.api import readiness
from manyhats.api.readiness import Readiness
from manyhats.errors import EngineFailedError, QueueFullError


def test_ready():
    api = Api()
    response = api.get("/readyz")
    body = response.json()
    assert response.status_code == 200
    assert (body["ready"], body["reason"]) == (True, None)
    assert body["kernels"] == {"backend": "reference", "reason": "asked for by name"}
    assert api.series()['manyhats_kernels_info{backend="reference"}'] == 1
    assert (body["quantization"], body["dtype"], body["device"]) == ("nf4", "bf16", "cpu")
    assert body["slots"] == {"total": 8, "used": 2}
    assert body["model"] == "org/base"
    assert api.get("/health").status_code == 200
    assert api.get("/health").content == b""


def test_not_ready_is_503_with_the_reason_while_the_process_lives():
    api = Api(engine=FakeEngine(ready=False))
    response = api.get("/readyz")
    assert response.status_code == 503
    assert response.json()["ready"] is False
    assert "draining" in response.json()["reason"]
    assert api.get("/health").status_code == 503
    assert api.get("/healthz").status_code == 200
    assert api.get("/healthz").json() == {"status": "ok"}


def test_startup_liveness_and_readiness_are_three_things():
    """(startup, liveness, readiness, vLLM's readiness), from the start to the end."""
    api = Api(readiness=Readiness())

    def told() -> tuple[int, ...]:
        paths = ("/startupz", "/healthz", "/readyz", "/health")
        return tuple(api.get(path).status_code for path in paths)

    assert told() == (503, 200, 503, 503)
    assert api.get("/startupz").json()["reason"] == "the base has not answered its probe yet"
    assert api.series()["manyhats_ready"] == 0
    anyio.run(api.readiness.prove, api.engine)
    assert told() == (200, 200, 200, 200)
    assert api.series()["manyhats_ready"] == 1
    api.readiness.drain()
    assert told() == (200, 200, 503, 503)
    assert "draining" in api.get("/readyz").json()["reason"]
    assert api.complete().status_code == 200  # what still comes is served until the door closes
    api.engine.ready, api.engine.failed = False, True
    assert told() == (200, 503, 503, 503)
    assert "defect" in api.get("/healthz").json()["status"]


def test_the_probe_is_one_greedy_token_of_the_base():
    api = Api(readiness=Readiness())
    anyio.run(api.readiness.prove, api.engine)
    (request,) = api.engine.requests
    assert request.adapter is None
    assert [(p.max_tokens, p.temperature) for p in request.params] == [(1, 0.0)]


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ({"refuse": QueueFullError("no room", retry_after_s=1.0)}, "no room"),
        ({"error": EngineFailedError("no numbers"), "error_after": 0}, "no numbers"),
    ],
)
def test_a_base_that_does_not_answer_is_asked_again(trouble, words, monkeypatch):
    api = Api(readiness=Readiness(), engine=FakeEngine(**trouble))
    seen = []

    async def mend(_seconds: float) -> None:
        seen.append(api.readiness.reason(api.engine))
        if len(seen) == 2:
            api.engine.refuse = api.engine.error = None

    monkeypatch.setattr(readiness.anyio, "sleep", mend)
    anyio.run(api.readiness.prove, api.engine)
    assert seen == [f"the base has not answered its probe: {words}"] * 2
    assert api.get("/readyz").status_code == 200


@pytest.mark.parametrize("score", [float("nan"), float("-inf")])
def test_a_base_that_answers_with_no_number_is_not_ready(score, monkeypatch):
    monkeypatch.setattr("support.fake_engine.logprob_of", lambda _token: score)
    with pytest.raises(EngineFailedError, match="log-probabilities"):
        anyio.run(readiness.probe, FakeEngine())


def test_version():
    assert Api().get("/version").json() == {"version": manyhats.__version__}


def test_metrics_are_prometheus_text_and_count_answers_by_route():
    api = Api()
    api.complete()
    api.complete(nope=1)
    api.get("/v1/models/pirate")
    api.get("/some/path/of/an/attacker")
    response = api.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    series = api.series()

    def count(route: str, status: int, method: str = "GET") -> float:
        labels = f'method="{method}",route="{route}",status="{status}"'
        return series[f"manyhats_http_requests_total{{{labels}}}"]

    assert count("/v1/completions", 200, "POST") == 1
    assert count("/v1/completions", 400, "POST") == 1
    assert count("/v1/models/{model_id:path}", 200) == 1
    assert count("unmatched", 404) == 1
    assert "attacker" not in response.text


def test_odd_methods_share_a_label():
    api = Api()
    for i in range(5):
        api.send(f"ODD{i}", "/v1/models")
    odd = [name for name in api.series() if "ODD" in name]
    assert odd == []
    assert any('method="other"' in name for name in api.series())


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json"])
def test_documentation_pages_are_there_only_without_keys(path):
    assert Api().get(path).status_code == 200
    assert Api(settings=settings_of(api_keys=("secret",))).get(path).status_code == 404
