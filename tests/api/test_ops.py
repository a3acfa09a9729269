"""Liveness, readiness, version, metrics."""

import pytest
from support.api import Api, settings_of
from support.fake_engine import FakeEngine

import manyhats


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
