"""`manyhats gc` against the real application over a socket, and the route behind it."""

from __future__ import annotations

import json

import pytest
from support.adapter_service import open_adapters, write_adapter
from support.api import Api, serving
from typer.testing import CliRunner

from manyhats import cli
from manyhats.api import admin, audit, collection, rollouts
from manyhats.lifecycle.collector import Retention

ROUTERS = (admin.router, audit.router, rollouts.router, collection.router)


@pytest.fixture
def api(tmp_path):
    """``a@1`` is retired, ``a@2`` serves."""
    with open_adapters(tmp_path, retention=Retention(retired_s=0)) as adapters:
        api = Api(directory=adapters.service, routers=ROUTERS)
        for seed in range(2):
            path = str(write_adapter(adapters.root / str(seed), seed))
            assert api.post("/admin/adapters", {"name": "a", "path": path}).status_code == 201
        assert api.post("/admin/adapters/a/retire", {"version": 1}).status_code == 200
        yield api


def test_a_dry_run_says_what_a_run_then_does(api):
    with serving(api.app) as (host, port):

        def run(*words):
            command = ["gc", *words, "--json", "--url", f"http://{host}:{port}"]
            result = CliRunner().invoke(cli.app, command)
            assert result.exit_code == 0, result.output
            return json.loads(result.output)

        told = run("--dry-run")
        assert (told["versions"], len(told["digests"])) == (["a@1"], 1)
        assert told["bytes"] > 0
        assert run("--reason", "disk is short") == {**told, "dry_run": False}
        assert run() == {**told, "versions": [], "digests": [], "bytes": 0, "dry_run": False}
    entry = api.get("/admin/audit").json()["data"][-1]
    assert (entry["action"], entry["reason"]) == ("gc", "disk is short")
    assert entry["after"]["bytes"] == told["bytes"]
    assert [v["version"] for v in api.get("/admin/adapters/a").json()["versions"]] == [2]


def test_the_body_is_checked(api):
    for body in ({"dry_run": "yes"}, {"reason": "x" * 1001}, {"what": 1}):
        assert api.post("/admin/gc", body).status_code == 400
