"""The compose file's services, started as it says, answering and scraped: every expression of the
rules and of the dashboards has a value, and the gateway's protocol is spoken to the same server.
"""

from __future__ import annotations

import json
import re
import subprocess

import httpx
import pytest
import redis
import yaml
from prometheus_client.parser import text_string_to_metric_families
from support.base import write_adapters
from support.polling import until
from support.prometheus import tool

pytestmark = pytest.mark.e2e

VARIABLES = {
    "$__rate_interval": "1m",
    "$__range": "1m",
    "$instance": ".*",
    "$adapter": ".*",
    "$tenant": ".*",
}
THRESHOLD = re.compile(r"^(?P<left>.*)\s(?:==|!=|>=|<=|>|<)\s[\d.]+$", re.DOTALL)


def rules(repository):
    """(alert's or record's name, its rule) of every rule."""
    for path in sorted((repository / "deploy/prometheus/rules").glob("*.yml")):
        for group in yaml.safe_load(path.read_text("utf-8"))["groups"]:
            for rule in group["rules"]:
                yield rule.get("alert") or rule["record"], rule


def expressions(repository):
    """(where, expression) of every rule's left side, every panel and every annotation."""
    for name, rule in rules(repository):
        matched = THRESHOLD.match(rule["expr"].strip())
        assert ("alert" in rule) == (matched is not None), name
        yield name, matched["left"] if matched else rule["expr"]
    for path in sorted((repository / "deploy/grafana/dashboards").glob("*.json")):
        dashboard = json.loads(path.read_text("utf-8"))
        for panel in dashboard["panels"]:
            for target in panel.get("targets", []):
                yield f"{dashboard['title']}: {panel['title']}", target["expr"]
        for annotation in dashboard["annotations"]["list"]:
            if "expr" in annotation:
                yield annotation["name"], THRESHOLD.match(annotation["expr"])["left"]


def complete(stack, model, **more) -> httpx.Response:
    body = {"model": model, "prompt": "w7 w8 w9", "max_tokens": 3, "ignore_eos": True, **more}
    return stack.http.post("/v1/completions", json=body)


def scrapes(stack) -> float:
    """How many scrapes were good so far."""
    found = stack.prometheus.query("sum(sum_over_time(up[1h]))")
    return float(found[0]["value"][1]) if found else 0.0


@pytest.fixture(scope="module")
def used(stack):
    """The stack after traffic over base and adapters, seen by two scrapes and by the rules."""

    def evaluated() -> bool:
        found = stack.prometheus.query("job:manyhats_generation_tokens:rate5m > 0")
        return bool(found)

    until(lambda: scrapes(stack) >= 2)
    for model in (stack.base, "pirate", "legal", "haiku"):
        assert complete(stack, model).status_code == 200
    before = scrapes(stack)
    until(lambda: scrapes(stack) >= before + 2 and evaluated())
    return stack


def test_the_services_answer(stack):
    ready = stack.http.get("/readyz").json()
    assert (ready["ready"], ready["model"]) == (True, stack.base)
    names = {card["id"] for card in stack.http.get("/v1/models").json()["data"]}
    assert names == {stack.base, "pirate", "legal", "haiku"}
    answer = complete(stack, "pirate")
    assert answer.headers["x-manyhats-served-by"] == "pirate@1"
    keyless = httpx.post(f"{stack.server.base_url}/v1/completions", json={}, timeout=30)
    assert keyless.status_code == 401
    tenant = {"authorization": "Bearer a-tenant-key"}
    listed = httpx.get(f"{stack.server.base_url}/admin/adapters", headers=tenant, timeout=30)
    assert listed.status_code == 403


def test_the_tenants_lie_in_the_redis_of_the_file(stack):
    body = {"id": "acme", "quotas": {"requests_per_minute": 1}}
    assert stack.http.post("/admin/tenants", json=body).status_code == 201
    with redis.Redis.from_url(stack.redis.url) as client:
        assert any(b"tenancy" in key for key in client.keys("*"))
    assert stack.http.delete("/admin/tenants/acme").status_code in (200, 204)


def test_prometheus_scrapes_the_server_and_has_our_rules(used, repository):
    def last_scrape() -> list[tuple[str, str]]:
        targets = used.prometheus.get("targets")["activeTargets"]
        return [(target["health"], target["lastError"]) for target in targets]

    # a machine under load may miss one
    until(lambda: last_scrape() == [("up", "")], told=last_scrape)
    groups = used.prometheus.get("rules")["groups"]
    loaded = {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}
    assert loaded == {name: "ok" for name, _ in rules(repository)}


def test_every_expression_of_rules_and_dashboards_has_a_value(used, repository):
    left = {}
    for where, expression in expressions(repository):
        for variable, value in VARIABLES.items():
            expression = expression.replace(variable, value)
        assert "$" not in expression, where
        left[f"{where}: {expression}"] = expression
    assert len(left) > 80
    for _ in range(5):  # a machine under load may miss a scrape, and its series for a moment
        left = {text: e for text, e in left.items() if not used.prometheus.query(e)}
        if not left:
            break
        seen = scrapes(used)
        until(lambda seen=seen: scrapes(used) > seen)
    assert list(left) == []


def test_prometheus_keeps_exemplars_that_name_a_request(used):
    query = "manyhats_time_to_first_token_seconds_bucket"
    found = used.prometheus.get(f"query_exemplars?query={query}&start=0&end=9999999999")
    named = {e["labels"]["request_id"] for series in found for e in series["exemplars"]}
    assert named
    assert all(name.startswith(("cmpl-", "chatcmpl-", "probe-")) for name in named), named


def test_nothing_is_alarmed_about_a_healthy_server(used):
    alerts = used.prometheus.get("alerts")["alerts"]
    assert [a["labels"]["alertname"] for a in alerts if a["state"] == "firing"] == []


def test_promtool_has_nothing_to_say_of_the_metrics_but_the_gateways_colons(used):
    text = httpx.get(f"{used.server.base_url}/metrics", timeout=30).text
    told = subprocess.run(
        [tool("promtool"), "check", "metrics"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    remarks = [line for line in told.stderr.splitlines() if line]
    assert all(line.startswith("vllm:") and "':'" in line for line in remarks), remarks
    # without those names, whose form the gateway's protocol prescribes, it is content
    own = "\n".join(line for line in text.splitlines() if "vllm:" not in line) + "\n"
    subprocess.run([tool("promtool"), "check", "metrics"], input=own, text=True, check=True)


# The endpoint picker's side of the Gateway API Inference Extension's model server protocol.


def gauges(stack) -> dict[str, object]:
    """What the picker's scraper takes from /metrics: the newest ``lora_requests_info`` counts."""
    families = text_string_to_metric_families(stack.server.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    by_name = {s.name: s.value for s in samples if s.name.startswith("vllm:num")}
    info = max((s for s in samples if s.name == "vllm:lora_requests_info"), key=lambda s: s.value)
    split = {k: {n for n in v.split(",") if n} for k, v in info.labels.items() if k != "max_lora"}
    usage = next(s.value for s in samples if s.name == "vllm:kv_cache_usage_perc")
    return {**by_name, **split, "max_lora": int(info.labels["max_lora"]), "kv": usage}


def test_the_endpoint_picker_reads_queue_cache_and_affinity(used):
    assert complete(used, "legal").status_code == 200
    seen = gauges(used)
    assert seen["vllm:num_requests_waiting"] == seen["vllm:num_requests_running"] == 0
    assert 0 <= seen["kv"] <= 1
    assert seen["max_lora"] == 32
    # affinity: a request for this adapter scores this server higher than one without it
    assert "legal" in seen["running_lora_adapters"]
    assert seen["waiting_lora_adapters"] == set()


def test_the_lora_syncer_loads_and_unloads_idempotently(used, tmp_path_factory):
    """As the sidecar does: it knows only these two routes, /health and /v1/models."""
    stack = used
    root = next(p for p in (tmp_path_factory.getbasetemp()).glob("stack*/adapters"))
    write_adapters(root, root.parent / "tiny", ("synced",), seed=77)
    body = {"lora_name": "synced", "lora_path": str(root / "synced"), "base_model_name": stack.base}
    assert httpx.get(f"{stack.server.base_url}/health", timeout=30).status_code == 200
    for _ in range(2):
        answer = stack.http.post("/v1/load_lora_adapter", json=body)
        assert answer.status_code == 200, answer.text
    ids = [card["id"] for card in stack.http.get("/v1/models").json()["data"]]
    assert ids.count("synced") == 1
    assert complete(stack, "synced").headers["x-manyhats-served-by"] == "synced@1"
    assert "synced" in gauges(stack)["running_lora_adapters"]
    for _ in range(2):
        answer = stack.http.post("/v1/unload_lora_adapter", json={"lora_name": "synced"})
        assert answer.status_code == 200, answer.text
    assert complete(stack, "synced").status_code == 404
    until(lambda: "synced" not in gauges(stack)["running_lora_adapters"])


def test_a_store_that_is_away_shows_and_takes_nobody_down(used):
    """Last of this file: Redis stands still, and goes on afterwards."""

    def up() -> set[float]:
        found = used.prometheus.query('manyhats_store_up{store="tenants"}')
        return {float(sample["value"][1]) for sample in found}

    def alerted() -> bool:
        alerts = used.prometheus.get("alerts")["alerts"]
        return "ManyhatsStoreAway" in {a["labels"]["alertname"] for a in alerts}

    until(lambda: up() == {1.0})
    used.redis.pause()
    try:
        until(lambda: up() == {0.0} and alerted())
        assert used.http.get("/readyz").status_code == 200
        assert complete(used, "pirate").status_code == 200
    finally:
        used.redis.resume()
    until(lambda: up() == {1.0})
