"""Rules and dashboards by themselves: promtool's tests, ids, and only metrics that there are."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
import yaml
from support.prometheus import tool

METRIC = re.compile(r"\b((?:manyhats|process|vllm)[_:][a-z0-9_:]+)")
RECORD = re.compile(r"\b((?:job|adapter|instance|tenant):[a-z0-9_:]+)")


def dashboards(repository):
    return sorted((repository / "deploy/grafana/dashboards").glob("*.json"))


def described(repository) -> set[str]:
    """The series of docs/metrics.md; of a histogram its three."""
    text = (repository / "docs" / "metrics.md").read_text("utf-8")
    found = set()
    for name, kind in re.findall(r"^\| `([^`]+)` \| (\w+) \|", text, re.MULTILINE):
        parts = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        found |= {name + part for part in parts}
    return found


def rules(repository):
    for path in sorted((repository / "deploy/prometheus/rules").glob("*.yml")):
        for group in yaml.safe_load(path.read_text("utf-8"))["groups"]:
            yield from group["rules"]


def run(repository, *words):
    return subprocess.run(
        [tool("promtool"), *words],
        cwd=repository / "deploy" / "prometheus",
        capture_output=True,
        text=True,
        check=False,
    )


def test_promtool_takes_the_configuration_and_the_rules(repository):
    told = run(repository, "check", "config", "prometheus.yml")
    assert told.returncode == 0, told.stdout + told.stderr


def test_the_rules_pass_their_own_tests(repository):
    told = run(repository, "test", "rules", "tests/alerts.yml")
    assert told.returncode == 0, told.stdout + told.stderr


def test_every_alert_has_been_seen_to_fire_and_to_be_quiet(repository):
    tests = yaml.safe_load((repository / "deploy/prometheus/tests/alerts.yml").read_text("utf-8"))
    fired, quiet = set(), set()
    for test in tests["tests"]:
        for case in test["alert_rule_test"]:
            (fired if case["exp_alerts"] else quiet).add(case["alertname"])
    alerts = {rule["alert"] for rule in rules(repository) if "alert" in rule}
    assert fired == quiet == alerts


def test_every_alert_says_how_bad_it_is_and_what_to_do(repository):
    for rule in rules(repository):
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("critical", "warning", "info"), rule
            assert {"summary", "description"} == set(rule["annotations"]), rule


def named(repository):
    """(where, expression) of everything that names series."""
    for rule in rules(repository):
        yield rule.get("alert") or rule["record"], rule["expr"]
    for path in dashboards(repository):
        dashboard = json.loads(path.read_text("utf-8"))
        for panel in dashboard["panels"]:
            for target in panel.get("targets", []):
                yield panel["title"], target["expr"]
        for variable in dashboard["templating"]["list"]:
            yield variable["name"], variable.get("definition", "")


def test_only_documented_metrics_are_named(repository):
    known, recorded = (
        described(repository),
        {r["record"] for r in rules(repository) if "record" in r},
    )
    for where, expression in named(repository):
        records = set(RECORD.findall(expression))
        assert records <= recorded, where
        for record in records:
            expression = expression.replace(record, "")
        assert set(METRIC.findall(expression)) <= known, (where, expression)


def test_four_dashboards_are_provisioned(repository):
    loaded = [json.loads(path.read_text("utf-8")) for path in dashboards(repository)]
    topics = ("adapters", "drift", "fleet", "tenants")
    assert [d["uid"] for d in loaded] == [f"manyhats-{topic}" for topic in topics]
    assert len({d["title"] for d in loaded}) == 4
    folder = repository / "deploy/grafana/provisioning"
    provider = yaml.safe_load((folder / "dashboards/manyhats.yml").read_text("utf-8"))
    source = yaml.safe_load((folder / "datasources/prometheus.yml").read_text("utf-8"))
    compose = yaml.safe_load((repository / "docker-compose.yml").read_text("utf-8"))
    mounts = [v.split(":")[:2] for v in compose["services"]["grafana"]["volumes"]]
    (path,) = [p["options"]["path"] for p in provider["providers"]]
    assert ["./deploy/grafana/dashboards", path] in mounts
    assert ["./deploy/grafana/provisioning", "/etc/grafana/provisioning"] in mounts
    assert source["datasources"][0]["url"] == "http://prometheus:9090"


@pytest.mark.parametrize("topic", ["adapters", "drift", "fleet", "tenants"])
def test_a_dashboard_is_well_formed(repository, topic):
    path = repository / f"deploy/grafana/dashboards/manyhats-{topic}.json"
    dashboard = json.loads(path.read_text("utf-8"))
    panels = dashboard["panels"]
    assert len({p["id"] for p in panels}) == len(panels) > 5
    variables = {v["name"]: v for v in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    cells = set()
    for panel in panels:
        grid = panel["gridPos"]
        covered = {
            (x, y)
            for x in range(grid["x"], grid["x"] + grid["w"])
            for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert not covered & cells, panel["title"]
        assert max(x for x, _ in covered) < 24
        cells |= covered
        if panel["type"] == "row":
            continue
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["targets"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval", "__range"}
            assert used <= set(variables), panel["title"]
        refs = [t["refId"] for t in panel["targets"]]
        assert len(set(refs)) == len(refs)
