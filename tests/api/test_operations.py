"""Registrations from elsewhere over the API and the command line: started, watched, ended."""

from __future__ import annotations

import json
import threading

import pytest
from support.adapter_service import MAX_BYTES, config_bytes, open_adapters, weights_bytes
from support.api import Api, assert_error, serving
from support.web import web_server
from typer.testing import CliRunner

from manyhats import cli
from manyhats.adapters.sources.address import AllowList
from manyhats.adapters.sources.fetch import Fetcher
from manyhats.api import admin, operations, rollouts
from manyhats.lifecycle.operations import Operations
from manyhats.tenancy.model import Role, Tenant


@pytest.fixture
def web():
    with web_server() as web:
        for seed in range(3):
            web.files[f"/pub/{seed}/adapter_config.json"] = config_bytes(8)
            web.files[f"/pub/{seed}/adapter_model.safetensors"] = weights_bytes(seed, 8)
        yield web


@pytest.fixture
def api(tmp_path, web):
    with open_adapters(tmp_path) as adapters:
        fetcher = Fetcher(AllowList([f"{web.url}/pub/"]), MAX_BYTES)
        running = Operations(adapters.service, fetcher, tmp_path / "partial", workers=2)
        routers = (admin.router, operations.router, rollouts.router)
        api = Api(directory=adapters.service, routers=routers, operations=running)
        api.partial = tmp_path / "partial"
        yield api
        running.close()


def body(web, seed=0, **more):
    return {"name": "a", "source": {"url": f"{web.url}/pub/{seed}"}, **more}


def ended(api, ident):
    """The operation once it has ended."""
    api.operations.get(ident, "default").done.result(30)
    return api.get(f"/admin/operations/{ident}").json()


def test_a_registration_is_fetched_beside(api, web):
    web.gate = threading.Event()
    answer = api.post("/admin/adapters", body(web, promote=True, metadata={"epochs": "3"}))
    operation = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/admin/operations/{operation['id']}"
    assert web.half.wait(30)
    again = api.post("/admin/adapters", body(web, promote=True, metadata={"epochs": "3"}))
    assert again.json()["id"] == operation["id"], "the same one goes on"
    shown = api.get(answer.headers["location"]).json()
    assert shown["state"] == "fetching"
    total = len(config_bytes(8)) + len(weights_bytes(0, 8))
    assert shown["bytes_total"] == total
    assert api.get("/admin/adapters").json()["data"] == []
    web.gate.set()
    done = ended(api, operation["id"])
    assert (done["state"], done["adapter"], done["error"]) == ("succeeded", "a@1", None)
    assert done["bytes_done"] == total
    version = api.get("/admin/adapters/a").json()["versions"][0]
    assert version["source"] == f"{web.url}/pub/0"
    assert version["metadata"] == {"epochs": "3"}
    assert list(api.partial.iterdir()) == []
    assert [o["id"] for o in api.get("/admin/operations").json()["data"]] == [operation["id"]]


def test_waiting_gives_the_version_or_the_error(api, web):
    answer = api.post("/admin/adapters?wait=true", body(web))
    assert (answer.status_code, answer.json()["version"]) == (201, 1)
    web.files["/pub/1/adapter_model.safetensors"] = b"no safetensors"
    answer = api.post("/admin/adapters?wait=true", body(web, 1))
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "adapter_rejected"
    assert list(api.partial.iterdir()) == [], "a bad one leaves nothing"
    assert len(api.get("/admin/adapters").json()["data"]) == 1


def test_one_that_broke_off_goes_on_after_a_restart(api, web, tmp_path):
    path = "/pub/2/adapter_model.safetensors"
    web.cut[path] = [300]
    web.gate = threading.Event()
    started = api.post("/admin/adapters", body(web, 2)).json()
    assert web.half.wait(30)
    assert api.send("DELETE", f"/admin/operations/{started['id']}").status_code == 200
    web.gate.set()
    assert ended(api, started["id"])["state"] == "cancelled"
    [folder] = api.partial.iterdir()
    assert (folder / "adapter_model.safetensors.part").stat().st_size >= 300
    assert api.post("/admin/adapters?wait=true", body(web, 2)).status_code == 201
    assert web.asked[-1][1] is not None


@pytest.mark.parametrize(
    ("changes", "status", "param", "words"),
    [
        ({"source": {"url": "https://elsewhere.example/a"}}, 400, "source", ["--source-allow"]),
        ({"source": {"hub": "org/a", "revision": "0" * 40}}, 400, "source", ["--source-allow"]),
        ({"source": {"hub": "org/a", "revision": "main"}}, 400, "revision", ["40 hex digits"]),
        ({"source": {"hub": "org/a"}}, 400, "source.hub.revision", []),
        ({"source": {"url": "https://x/a", "sha256": "xyz"}}, 400, "source.url.sha256", []),
        ({"source": {"url": "https://x/a", "etag": "1"}}, 400, "source.url.etag", ["unknown"]),
        ({"path": "/x"}, 400, "source", ["give one of"]),
        ({"source": "just a text"}, 400, "path", ["give one of"]),
        ({"name": "a@1"}, 400, "name", []),
    ],
)
def test_a_bad_source_is_named_at_once(api, web, changes, status, param, words):
    answer = api.post("/admin/adapters", {**body(web), **changes})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param, error
    assert all(word in error["message"] for word in words), error
    assert web.asked == []


def test_another_tenants_operations_do_not_exist(api, web):
    api.tenants.create(Tenant(id="acme"))
    theirs, key = (api.tenants.issue(t, Role.OPERATOR)[1] for t in ("acme", "default"))
    headers = {"authorization": f"Bearer {key}"}
    ident = api.post("/admin/adapters", body(web), headers=headers).json()["id"]
    other = {"authorization": f"Bearer {theirs}"}
    assert api.get("/admin/operations", headers=other).json()["data"] == []
    for method in ("GET", "DELETE"):
        answer = api.send(method, f"/admin/operations/{ident}", headers=other)
        assert_error(answer, 404, "not_found", "id", "no operation")


def test_the_command_watches_it(api, web, monkeypatch):
    with serving(api.app) as (host, port):
        monkeypatch.setenv("MANYHATS_URL", f"http://{host}:{port}")
        monkeypatch.setenv("COLUMNS", "200")

        def run(*words, code=0):
            result = CliRunner().invoke(cli.app, ["adapters", *words])
            assert result.exit_code == code, result.output
            return result.stdout if not code else result.output

        url = f"{web.url}/pub/0"
        assert "a@1 is registered, the stable version\n" in run("register", "a", url)
        shown = json.loads(run("register", "a", f"{web.url}/pub/1", "--json", "--no-promote"))
        assert (shown["version"], shown["stable"]) == (2, False)
        assert "--source-allow" in run("register", "a", "https://x.example/", code=1)
        assert "digest_mismatch" in run("register", "a", url, "--sha256", "0" * 64, code=1)
        assert "40 hex digits" in run("register", "a", "hf://org/a", code=1)
        started = run("register", "a", f"{web.url}/pub/2", "--no-wait")
        ident = started.split(":")[0]
        ended(api, ident)
        assert "succeeded" in run("operations", ident)
        assert ident in run("operations")
