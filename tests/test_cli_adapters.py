"""`manyhats adapters ...` against the real application over a socket."""

from __future__ import annotations

import json

import httpx
import pytest
import typer
from pydantic import SecretStr
from support.adapter_service import open_adapters, write_adapter
from support.api import Api, serving, settings_of
from typer.testing import CliRunner

from manyhats import cli
from manyhats.api import admin, audit, rollouts
from manyhats.commands.client import Client
from manyhats.config import unknown_variables
from manyhats.engine.no_adapters import NoAdapters
from manyhats.lifecycle.pins import Pins

KEY = "s3cret"


@pytest.fixture
def served(tmp_path):
    """(address, folder that may be registered from, the adapters behind it)."""
    with open_adapters(tmp_path / "home") as adapters:
        api = Api(
            settings=settings_of(admin_api_keys=(SecretStr(KEY),)),
            directory=adapters.service,
            routers=(admin.router, audit.router, rollouts.router),
            pins=Pins(adapters.registry, adapters.service.entry, NoAdapters(), bound=1),
        )
        with serving(api.app) as (host, port):
            yield f"http://{host}:{port}", adapters.root, adapters


@pytest.fixture
def run(served, monkeypatch):
    """One command; what it printed. ``code``: the exit code expected."""
    monkeypatch.setenv("MANYHATS_URL", served[0])
    monkeypatch.setenv("MANYHATS_KEY", KEY)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words, code=0):
        result = CliRunner().invoke(cli.app, ["adapters", *map(str, words)])
        assert result.exit_code == code, result.output
        return result.output

    return run


def registered(run, root, name="pirate", versions=2):
    for seed in range(versions):
        run("register", name, write_adapter(root / f"{name}-{seed}", seed))


def test_the_life_of_an_adapter(run, served):
    _, root, _ = served
    folder = write_adapter(root / "a", 0)
    assert run("register", "pirate", folder) == "pirate@1 is registered, the stable version\n"
    newer = write_adapter(root / "b", 1)
    said = ["--no-promote", "--reason", "fresh", "--revision", "r7", "--source", "hub:me/p"]
    assert "pirate@2 is registered, not the stable" in run("register", "pirate", newer, *said)
    assert run("canary", "pirate", 2, "--percent", "12.5") == (
        "pirate: stable 1, canary 2 (12.5 %)\n"
    )
    shown = run("show", "pirate")
    assert "pirate: stable 1, canary 2 (12.5 %)" in shown
    for word in ("canary, 12.5 %", "hub:me/p", "r7", "default/admin", "1970-01-01 00:20:34"):
        assert word in shown
    assert run("promote", "pirate") == "pirate: stable 2\n"
    assert run("rollback", "pirate", "--reason", "worse") == "pirate: stable 1\n"
    assert run("rollback", "pirate", "baseline") == "pirate: stable baseline\n"
    assert run("rollback", "pirate", "2") == "pirate: stable 2\n"
    assert run("retire", "pirate", 1) == "pirate@1 is retired\n"
    assert "pirate@1" not in run("list")
    assert run("retire", "pirate", 1, "--undo") == "pirate@1 is checked\n"
    assert run("delete", "pirate@1") == "pirate@1 is deleted (versions: 1)\n"
    told = run("audit", "--name", "pirate")
    assert run("audit", "--own", "pirate") == told
    for word in ("register", "worse", "stable baseline", "canary 2 (12.5 %)", "delete", "fresh"):
        assert word in told
    assert "entries, the chain holds; newest: " in run("audit", "--verify")


def test_a_schedule(run, served):
    registered(run, served[1])
    started = run("canary", "pirate", 1, "--every", 600, "--steps", "1,100")
    assert started == "pirate: stable 2, canary 1 (1 %), step 1 of 2\n"
    held = run("canary", "pirate", "--hold", "--reason", "a look at it")
    assert held == "pirate: stable 2, canary 1 (1 %), held: a look at it\n"
    assert "step 1 of 2" in run("canary", "pirate", "--resume")
    assert run("canary", "pirate", "--percent", "0") == "pirate: stable 2\n"


def test_a_version_may_be_named_with_its_name(run, served):
    registered(run, served[1], versions=3)
    assert run("promote", "pirate@1") == "pirate: stable 1\n"
    assert run("promote", "pirate@2", 2) == "pirate: stable 2\n"
    assert run("canary", "pirate@1", "--percent", "5") == "pirate: stable 2, canary 1 (5 %)\n"
    assert run("rollback", "pirate@3") == "pirate: stable 3\n"
    assert run("retire", "pirate@1") == "pirate@1 is retired\n"
    assert run("retire", "pirate@1", "--undo") == "pirate@1 is checked\n"
    assert "pirate@1 and 2: name one version" in run("promote", "pirate@1", 2, code=1)
    assert "pirate@1 and baseline: name one" in run("rollback", "pirate@1", "baseline", code=1)
    assert "which version of pirate?" in run("retire", "pirate", code=1)


def test_a_shadow_and_a_pin(run, served):
    registered(run, served[1])
    assert run("shadow", "pirate@1", "--percent", "5") == "pirate: stable 2, shadow 1 (5 %)\n"
    assert run("pin", "pirate") == "pirate: stable 2, shadow 1 (5 %), pinned 2\n"
    assert "at most 1 (slots - 1): pirate@2" in run("pin", "pirate@1", code=1)
    shown = run("show", "pirate")
    assert "shadow, 5 %" in shown
    assert "stable; pinned" in shown
    assert run("shadow", "pirate", "--percent", "0") == "pirate: stable 2, pinned 2\n"
    assert run("unpin", "pirate@2") == "pirate: stable 2\n"
    assert "has no shadow" in run("shadow", "pirate", "--percent", "5", code=1)


def test_an_upload(run, served, tmp_path):
    folder = write_adapter(tmp_path / "elsewhere", 3)
    assert "path_not_allowed" in run("register", "up", folder, code=1)
    assert "up@1 is registered" in run("register", "up", folder, "--upload", "--promote")
    (folder / "adapter_model.safetensors").rename(folder / "adapter.safetensors")
    assert "up@1 is registered" in run("register", "up", folder, "--upload")  # as AdapterHub has it
    (folder / "head_config.json").touch()
    assert "head is not served" in run("register", "up", folder, "--upload", code=1)
    for name in ("head_config.json", "adapter_config.json"):
        (folder / name).unlink()
    assert "cannot be read: No such file" in run("register", "up", folder, "--upload", code=1)


def test_json_is_the_servers_answer(run, served):
    registered(run, served[1])
    assert json.loads(run("promote", "pirate", 1, "--json"))["route"]["stable"] == 1
    assert [c["version"] for c in json.loads(run("list", "--json"))["data"]] == [1, 2]
    assert json.loads(run("show", "pirate", "--json"))["name"] == "pirate"
    entries = json.loads(run("audit", "--json"))
    checked = json.loads(run("audit", "--verify", "--json"))
    assert checked == {"entries": len(entries), "problem": None, "newest": entries[-1]["hash"]}


def test_a_changed_log_is_told(run, served):
    registered(run, served[1])
    db = served[2].registry.store._db
    db.execute("DROP TRIGGER audit_keeps_words")
    [seq] = db.execute("SELECT max(seq) FROM audit").fetchone()
    [actor] = db.execute("SELECT actor FROM audit WHERE seq = ?", (seq,)).fetchone()
    db.execute("UPDATE audit SET actor = 'nobody' WHERE seq = ?", (seq,))
    assert f"entry {seq} is not what its hash says" in run("audit", "--verify", code=1)
    db.execute("UPDATE audit SET actor = ? WHERE seq = ?", (actor, seq))
    run("audit", "--verify")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("show", "nobody"), "no model or adapter 'nobody'"),
        (("promote", "nobody", 1), "no model or adapter"),
        (("rollback", "../../x"), "Not Found"),
        (("canary", "x"), "give one of --percent"),
        (("canary", "x", "--percent", 5, "--hold"), "give one of --percent"),
        (("canary", "x", "--every", 5, "--steps", "a,b"), "--steps a,b: percentages"),
        (("list", "--key", "wrong"), "the API key is not known"),
        (("list", "--url", "http://127.0.0.1:9"), "no answer from http://127.0.0.1:9"),
        (("list", "--url", "nonsense"), "no answer from"),
        (("list", "--url", "http://[::1"), "--url http://[::1"),
    ],
)
def test_a_refusal_is_one_line(run, words, message):
    output = run(*words, code=1)
    assert message in output
    assert output.startswith("manyhats: ")
    assert output.count("\n") == 1


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, text="<html>"),
        httpx.Response(200, json=[]),
        httpx.Response(502, text="Bad Gateway"),
        httpx.Response(404, json={"detail": "nothing here"}),
    ],
)
def test_what_is_no_manyhats_is_told(answer, capsys):
    transport = httpx.MockTransport(lambda request: answer)
    http = httpx.Client(base_url="http://x", transport=transport)
    with http, pytest.raises(typer.Exit):
        list(Client(http, as_json=False).audit())
    assert "http://x is no Manyhats server" in capsys.readouterr().err


def test_what_somebody_says_does_not_steer_the_terminal(run, served):
    folder = write_adapter(served[1] / "odd", 5)
    run("register", "odd", folder, "--source", "\x1b[31m[bold]x\n:smile:")
    assert "\ufffd[31m[bold]x\ufffd:smile:" in run("show", "odd")


def test_the_commands_variables_are_no_unknown_settings(monkeypatch):
    monkeypatch.setenv("MANYHATS_URL", "http://x")
    monkeypatch.setenv("MANYHATS_KEY", "x")
    monkeypatch.setenv("MANYHATS_KEYS", "x")
    assert unknown_variables() == ["MANYHATS_KEYS"]
