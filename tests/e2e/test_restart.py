"""A real server's end and new beginning: not ready, still serving, refusing, gone; warm again."""

from __future__ import annotations

import signal

import httpx
import pytest
from support.base import tiny_flags, write_adapters, write_base
from support.polling import PATIENCE_S, until
from support.server import running_server

pytestmark = pytest.mark.e2e


def loads(server, name: str) -> float:
    return server.value("manyhats_adapter_loads_total", adapter=name, tier="host")


def test_a_drain_loses_nobody_and_the_next_start_is_warm(tmp_path):
    base = write_base(tmp_path / "base")
    root = write_adapters(tmp_path / "adapters", base, ("warm", "cold", "hot"))
    flags = (*tiny_flags(base), "--adapter-root", str(root), "--prefetch-hot", "2")
    home = tmp_path / "home"
    with (
        running_server(home, *flags, "--register-roots", "--drain-grace-s", "600") as server,
        httpx.Client(base_url=server.base_url, timeout=PATIENCE_S) as http,
    ):

        def complete(model: str, **more) -> httpx.Response:
            body = {"model": model, "prompt": "w7 w8", "max_tokens": 2, "ignore_eos": True, **more}
            return http.post("/v1/completions", json=body)

        assert http.get("/startupz").json() == {"started": True, "reason": None}
        assert http.get("/readyz").status_code == 200
        # no request was sent: what has run is the probe
        assert server.value("manyhats_requests_total", adapter="base", outcome="length") == 1
        for name, times in (("hot", 5), ("warm", 3), ("cold", 1)):
            assert all(complete(name).status_code == 200 for _ in range(times))

        server.process.send_signal(signal.SIGTERM)
        until(lambda: http.get("/readyz").status_code == 503)
        assert "draining" in http.get("/readyz").json()["reason"]
        assert http.get("/healthz").status_code == http.get("/startupz").status_code == 200
        assert complete("hot").status_code == 200  # within the grace all is served
        body = {"model": "hot", "prompt": "w7", "max_tokens": 400, "ignore_eos": True}
        with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as running:
            lines = running.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)  # a second one ends the grace
            until(lambda: not reachable(server.base_url))
            assert list(lines)[-2:] == ["data: [DONE]", ""]  # what ran has ended whole
        assert server.stop() == 0
    again = (*tiny_flags(base), "--prefetch-hot", "2")
    with running_server(home, *again) as server:
        until(lambda: loads(server, "hot") == loads(server, "warm") == 1)
        assert loads(server, "cold") == 0
        cache = server.get("/admin/cache").json()
        assert cache["device"]["resident"] == []  # on the host: nobody has asked for them
        assert cache["host"]["bytes_used"] > 0


def reachable(url: str) -> bool:
    """Whether a new connection gets an answer other than a refusal."""
    try:
        return httpx.get(f"{url}/v1/models", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
