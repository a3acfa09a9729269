"""A real server that exports to a collector on a loopback socket, and logs as JSON."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from support.models import tiny_model, tiny_tokenizer
from support.polling import PATIENCE_S
from support.random_lora import write_random_lora
from support.server import running_server

pytestmark = pytest.mark.e2e

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector(ThreadingHTTPServer):
    """Keeps the bodies that are posted to it, by path."""

    def __init__(self) -> None:
        self.bodies: dict[str, list[bytes]] = {}
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.bodies.setdefault(self.path, []).append(body)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_spans_metrics_and_log_lines_of_a_real_request(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    targets = ["q_proj", "v_proj"]
    write_random_lora(
        tmp_path / "hats" / "blue", tmp_path / "base", rank=4, targets=targets, seed=1
    )
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "hats-of-the-test")
    flags = ["--model", str(tmp_path / "base"), "--quantization", "none", "--dtype", "fp32"]
    flags += ["--kernels", "torch", "--kv-cache-mb", "8", "--log-format", "json"]
    flags += ["--adapter-root", str(tmp_path / "hats"), "--register-roots"]
    body = {"model": "blue", "prompt": "w7 w8 w9", "max_tokens": 5, "ignore_eos": True}
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-01", "x-request-id": "the-one"}
    with running_server(tmp_path / "home", *flags) as server:
        answer = httpx.post(
            f"{server.base_url}/v1/completions", json=body, headers=headers, timeout=PATIENCE_S
        )
        assert answer.status_code == 200, answer.text
        assert server.stop() == 0, "what is left is exported before the process ends"
        output = list(server.output)

    spans = {}
    for raw in collector.bodies["/v1/traces"]:
        for resource in ExportTraceServiceRequest.FromString(raw).resource_spans:
            names = {a.key: a.value.string_value for a in resource.resource.attributes}
            assert names["service.name"] == "hats-of-the-test"
            for scope in resource.scope_spans:
                spans |= {(s.trace_id.hex(), s.name, s.span_id.hex()): s for s in scope.spans}
    ours = {name: span for (trace, name, _), span in spans.items() if trace == TRACE}
    assert set(ours) == {"POST /v1/completions", "queue", "load", "prefill", "decode"}
    parent = ours.pop("POST /v1/completions")
    assert parent.parent_span_id.hex() == SPAN
    for phase in ours.values():
        assert phase.parent_span_id == parent.span_id
        assert parent.start_time_unix_nano <= phase.end_time_unix_nano
        assert phase.end_time_unix_nano <= parent.end_time_unix_nano
    assert ours["queue"].end_time_unix_nano == ours["prefill"].start_time_unix_nano
    assert ours["load"].end_time_unix_nano <= ours["queue"].end_time_unix_nano
    tokens = {a.key: a.value.int_value for a in ours["decode"].attributes}
    assert tokens["gen_ai.usage.output_tokens"] == 5

    exported = {
        metric.name
        for raw in collector.bodies["/v1/metrics"]
        for resource in ExportMetricsServiceRequest.FromString(raw).resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }
    assert {"gen_ai.server.time_to_first_token", "manyhats.sequences"} <= exported

    logged = [json.loads(line) for line in output if line.startswith('{"time"')]
    (line,) = [one for one in logged if one.get("request_id") == "the-one"]
    assert (line["trace_id"], line["span_id"]) == (TRACE, parent.span_id.hex())
    assert (line["adapter"], line["output_tokens"], line["status"]) == ("blue@1", 5, 200)
