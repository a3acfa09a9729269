"""`manyhats tenants ...` against the real routes over a socket."""

from __future__ import annotations

import json

import pytest
from support.api import Api, serving, settings_of
from typer.testing import CliRunner

from manyhats import cli
from manyhats.api import tenants, usage


@pytest.fixture(scope="module")
def server():
    api = Api(
        settings=settings_of(admin_api_keys=("admin",), api_keys=("user",)),
        routers=[tenants.router, usage.router],
    )
    with serving(api.app) as (host, port):
        yield api, f"http://{host}:{port}"


@pytest.fixture
def run(server, monkeypatch):
    def invoke(*words, key="admin"):
        monkeypatch.setenv("MANYHATS_URL", server[1])
        monkeypatch.setenv("MANYHATS_KEY", key)
        return CliRunner().invoke(cli.app, ["tenants", *words])

    return invoke


def test_a_tenants_life(server, run):
    api, _ = server
    made = run("create", "acme", "--weight", "2", "--quota", "requests_per_minute=5")
    assert made.exit_code == 0, made.output
    assert made.stdout.splitlines()[1].split()[:3] == ["acme", "2.0", "0"]
    assert "requests_per_minute=5" in made.stdout
    run("set", "acme", "--priority", "-1", "--quota", "max_tokens=9")
    shown = json.loads(run("show", "acme", "--json").stdout)
    assert (shown["weight"], shown["priority"]) == (2.0, -1)
    assert {k: v for k, v in shown["quotas"].items() if v is not None} == {
        "requests_per_minute": 5,
        "max_tokens": 9,
        "priority": 0,
    }
    run("set", "acme", "--quota", "requests_per_minute=none")
    assert api.tenants.tenant("acme").quotas.requests_per_minute is None
    ident, key = run("issue", "acme", "--role", "operator", "--note", "ci").stdout.split()[2:]
    assert api.tenants.authenticate(key.encode()).id == ident
    assert f"{ident}  acme    operator" in run("keys", "acme").stdout
    fresh, newer = run("rotate", ident).stdout.split()[2:]
    assert api.tenants.authenticate(key.encode()) is None
    assert api.tenants.authenticate(newer.encode()).id == fresh
    assert run("revoke", fresh).exit_code == 0
    assert api.tenants.authenticate(newer.encode()) is None
    listed = [line.split()[0] for line in run("list").stdout.splitlines()]
    assert listed == ["id", "acme", "default"]
    assert run("delete", "acme").stdout.split() == ["id", "deleted", "acme", "True"]


def test_usage(server, run):
    api, _ = server
    api.complete(headers={"authorization": "Bearer user"})
    lines = [line.split() for line in run("usage").stdout.splitlines()]
    assert lines[0] == [
        *("tenant", "adapter", "requests", "prompt_tokens", "output_tokens", "resident_s", "nbytes")
    ]
    assert lines[1][:3] == ["default", "-", "1"]


def test_what_the_server_refuses_is_one_line_and_exit_code_1(run):
    for words, key, said in (
        (("show", "nobody"), "admin", "manyhats: no tenant 'nobody'\n"),
        (("list",), "user", "manyhats: this needs an API key with the admin role\n"),
        (("list",), "", "manyhats: an API key is needed"),
        (("create", "a b"), "admin", "manyhats: id: "),
    ):
        result = run(*words, key=key)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith(said), result.stderr


@pytest.mark.parametrize("quota", ["nope=1", "max_tokens", "max_tokens=-1", "max_tokens=x"])
def test_a_quota_that_is_none_is_exit_code_2(run, quota):
    result = run("create", "acme", "--quota", quota)
    assert result.exit_code == 2
    assert quota in result.stderr
    assert "tokens_per_day" in result.stderr


def test_a_server_that_does_not_answer_is_one_line(run):
    result = run("list", "--url", "http://127.0.0.1:1")
    assert result.exit_code == 1
    assert "no answer from http://127.0.0.1:1" in result.stderr
    assert run("list", "--url", "file:///etc/passwd").exit_code == 1
