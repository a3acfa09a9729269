"""Drift over HTTP and from the command line: answers are told of, judged, shown, and acted on."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from pydantic import SecretStr
from support.adapter_service import open_adapters, write_adapter
from support.api import Api, assert_error, serving, settings_of
from typer.testing import CliRunner

from manyhats import cli
from manyhats.api import admin, drift, rollouts
from manyhats.drift.build import open_drift
from manyhats.errors import AdapterLoadError, EngineFailedError
from manyhats.metrics import Metrics
from manyhats.types import DEFAULT_TENANT

ADMIN, USER = "adm1n", "us3r"
KEYS = {"admin_api_keys": (SecretStr(ADMIN),), "api_keys": (SecretStr(USER),)}
SMALL = {"drift_warm_up": 0, "drift_reference": 16, "drift_window": 16}
AS_ADMIN = {"authorization": f"Bearer {ADMIN}"}
AS_USER = {"authorization": f"Bearer {USER}"}


@pytest.fixture
def world(tmp_path):
    """An application over pirate@1 and pirate@2 with drift detection running."""
    settings, metrics = settings_of(**KEYS, **SMALL), Metrics(10)
    with open_adapters(tmp_path / "home") as adapters:
        for seed in (0, 1):
            folder = write_adapter(adapters.root / str(seed), seed)
            adapters.service.register_folder("pirate", str(folder), tenant=DEFAULT_TENANT)
        watching = open_drift(
            settings,
            tmp_path / "drift.sqlite",
            names=adapters.service,
            rollouts=adapters.service.rollouts,
            metrics=metrics.drift,
            decode=lambda ids: bytes(i for i in ids if i < 256).decode("utf-8", "replace"),
        )
        watching.monitor.start()
        api = Api(
            settings=settings,
            directory=adapters.service,
            metrics=metrics,
            routers=(admin.router, rollouts.router, drift.router),
            drift=watching,
        )
        try:
            yield SimpleNamespace(api=api, drift=watching, service=adapters.service)
        finally:
            watching.close()


def ask(world, **body):
    said = {"model": "pirate", "prompt": "hi", "seed": 1, "max_tokens": 20, **body}
    return world.api.send("POST", "/v1/completions", json=said, headers=AS_USER)


def shown(world):
    answer = world.api.send("POST", "/admin/adapters/pirate/drift/check", headers=AS_ADMIN)
    assert answer.status_code == 200, answer.text
    return answer.json()


def count(world, **labels):
    found = world.api.metrics.registry.get_sample_value("manyhats_drift_samples_total", labels)
    return found or 0


def test_answers_are_told_of_streamed_or_not_one_a_choice(world):
    assert ask(world).status_code == 200
    assert ask(world, n=2, stream=True).status_code == 200
    assert ask(world, prompt=["a", "b"], logprobs=1).status_code == 200
    chat = {"model": "pirate@2", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
    assert world.api.send("POST", "/v1/chat/completions", json=chat, headers=AS_USER).is_success
    assert ask(world, model="org/base", prompt="x", max_tokens=3).status_code == 404
    assert ask(world, model="tiny-base", max_tokens=3).status_code == 200
    assert ask(world, echo=True, max_tokens=0).status_code == 200
    assert ask(world, max_tokens=-1).status_code == 400
    (version,) = shown(world)["versions"]
    assert version["requests"] == 6
    assert count(world, adapter="pirate", kind="finished") == 6
    signals = version["signals"]
    assert signals["finish_reason"]["reference"]["counts"] == {"length": 1, "stop": 5}
    assert signals["output_tokens"]["reference"]["count"] == 6
    assert signals["ttft_seconds"]["reference"]["count"] == 6
    assert signals["script"]["reference"]["counts"] == {"latin": 6}


@pytest.mark.parametrize(("share", "begun"), [(1.0, 0.0), (0.0, 1.0)])
def test_answers_that_will_be_scored_again_are_kept_from_the_beginning(world, share, begun):
    """What the engine kept of each choice comes with its sample, whatever the routes' shares."""
    monitor, engine, samples = world.drift.monitor, world.api.engine, []
    monitor.offer = samples.append
    monitor.options = replace(monitor.options, share=share, canary_share=begun)
    asked = ask(world, n=2, prompt=["a", "b"], stream=True)
    assert asked.is_success
    assert [r.keeps_logits for r in engine.requests] == [share == 1.0] * 2
    assert [s.done.kept for s in samples] == [engine.kept[key] for key in sorted(engine.kept)]
    assert len(engine.kept) == (4 if share else 0)
    engine.requests.clear()
    ask(world, model="tiny-base")
    ask(world, model="weighted(pirate@1:0.5,pirate@2:0.5)")
    ask(world, echo=True, max_tokens=0)
    assert [r.keeps_logits for r in engine.requests if r] == [False] * len(engine.requests)
    assert len(engine.requests) >= 2


@pytest.mark.parametrize(
    ("failure", "field"),
    [(EngineFailedError("no"), "error"), (AdapterLoadError("gone"), "load_failure")],
)
def test_errors_of_the_server_are_a_signal(world, failure, field):
    world.api.engine.error = failure
    assert ask(world).status_code >= 500
    world.api.engine.error = None
    ask(world)
    (version,) = shown(world)["versions"]
    assert version["signals"][field]["reference"]["counts"] == {"0": 1, "1": 1}


def test_feedback_needs_ones_own_request(world):
    ident = ask(world).json()["id"]
    body = {"request_id": ident, "score": -1, "label": "wrong", "comment": "no rhyme"}
    send = world.api.send
    answer = send("POST", "/v1/feedback", json=body, headers=AS_USER)
    assert answer.json() == {
        "object": "feedback", "request_id": ident, "served_by": "pirate@2",
    }  # fmt: skip
    base = ask(world, model="tiny-base").json()["id"]
    answer = send("POST", "/v1/feedback", json={**body, "request_id": base}, headers=AS_USER)
    assert answer.json()["served_by"] == "baseline"
    assert send("POST", "/v1/feedback", json=body).status_code == 401
    unknown = send("POST", "/v1/feedback", json={**body, "request_id": "x"}, headers=AS_USER)
    assert_error(unknown, 404, "not_found", "request_id", "'x'")
    over = send("POST", "/v1/feedback", json={**body, "score": 2}, headers=AS_USER)
    assert_error(over, 400, "invalid_request", "score", "less than or equal to 1")
    (version,) = shown(world)["versions"]
    assert version["feedback"] == [
        {"request_id": ident, "score": -1.0, "label": "wrong", "comment": "no rhyme"}
    ]
    assert version["signals"]["feedback_score"]["reference"] == {
        "count": 1, "mean": -1.0, "quantiles": [-1.0] * 9,
    }  # fmt: skip


def test_the_policy_is_the_operators_and_names_only_what_there_is(world):
    path, send = "/admin/adapters/pirate/drift/policy", world.api.send
    body = {"action": "rollback", "signals": ["kl", "error"], "dry_run": True}
    assert send("PUT", path, json=body, headers=AS_USER).status_code == 403
    answer = send("PUT", path, json=body, headers=AS_ADMIN)
    assert answer.json()["policy"]["action"] == "rollback"
    assert shown(world)["policy"]["signals"] == ["kl", "error"]
    bad = send("PUT", path, json={"signals": ["rhymes"]}, headers=AS_ADMIN)
    assert_error(bad, 400, "invalid_request", "signals", "rhymes")
    gone = send("PUT", path.replace("pirate", "nobody"), json=body, headers=AS_ADMIN)
    assert gone.status_code == 404
    wait = send("PUT", path, json={"cool_down_s": -1}, headers=AS_ADMIN)
    assert_error(wait, 400, "invalid_request", "cool_down_s", "greater than or equal to 0")


def test_validations_and_a_reference_begun_anew(world):
    for _ in range(17):
        ask(world)
    (version,) = shown(world)["versions"]
    assert version["signals"]["output_tokens"]["state"] == "watched"
    reset = world.api.send("POST", "/admin/adapters/pirate/drift/reference", headers=AS_ADMIN)
    assert reset.json() == {"name": "pirate", "version": 2, "reference": "collecting"}
    ask(world)
    (version,) = shown(world)["versions"]
    assert version["signals"]["output_tokens"]["state"] == "collecting"
    path = "/admin/adapters/pirate/drift/validation"
    said = {"version": 2, "passed": True, "figures": {"nll": 1.25}}
    assert world.api.send("POST", path, json=said, headers=AS_ADMIN).is_success
    (outcome,) = shown(world)["validation"]["series"]
    assert (outcome["passed"], outcome["figures"]) == (True, {"nll": 1.25})
    unknown = world.api.send("POST", path, json={**said, "version": 9}, headers=AS_ADMIN)
    assert_error(unknown, 400, "invalid_request", "version", "no version 9")


def test_switched_off_it_says_so():
    api = Api(routers=(drift.router,))
    answer = api.send("POST", "/v1/feedback", json={"request_id": "x", "score": 1})
    assert_error(answer, 409, "conflict", None, "--drift")


def test_the_commands(world, monkeypatch, tmp_path):
    for _ in range(40):
        ask(world)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("MANYHATS_KEY", ADMIN)

    def run(*words, code=0):
        result = CliRunner().invoke(cli.app, ["drift", *map(str, words)])
        assert result.exit_code == code, result.output
        return result.output

    with serving(world.api.app) as (host, port):
        monkeypatch.setenv("MANYHATS_URL", f"http://{host}:{port}")
        told = run("policy", "pirate", "rollback", "--dry-run", "--signal", "kl")
        assert told == "pirate: rollback, dry run, on kl\n"
        drawing = tmp_path / "pirate.svg"
        text = run("show", "pirate", "--check", "--plot", drawing)
        for word in ("pirate@2 (stable, 40 requests)", "output_tokens", "watched", "rollback"):
            assert word in text
        assert "alarm" not in text
        tree = ElementTree.parse(drawing).getroot()
        texts = [e.text for e in tree.iter() if e.tag.endswith("text")]
        assert "pirate@2: reference (grey) and now" in texts
        assert "finish_reason" in texts
        assert json.loads(run("show", "pirate", "--json"))["policy"]["dry_run"] is True
        assert "collected anew" in run("reset", "pirate")
        assert ".svg" in run("show", "pirate", "--plot", tmp_path / "x.png", code=1)
