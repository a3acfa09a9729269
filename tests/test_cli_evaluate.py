"""`manyhats adapters evaluate` and `gate` against the real application over a socket."""

from __future__ import annotations

import json

import pytest
from pydantic import SecretStr
from support.adapter_service import open_adapters, write_adapter
from support.api import Api, serving, settings_of
from support.fake_engine import FakeEngine
from typer.testing import CliRunner

from manyhats import cli
from manyhats.api import admin, evaluations, rollouts
from manyhats.lifecycle.evaluation.service import EvaluationService
from manyhats.lifecycle.evaluation.store import EvaluationStore

KEY = "s3cret"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """One command; what it printed. ``code``: the exit code expected."""
    monkeypatch.setattr("manyhats.commands.evaluate._POLL_S", 0.01)
    with open_adapters(tmp_path / "home") as adapters:
        engine = FakeEngine()
        service = EvaluationService(
            engine, adapters.service, EvaluationStore(adapters.registry), lambda *_: None
        )
        adapters.service.rollouts.gate = service.objection
        api = Api(
            settings=settings_of(admin_api_keys=(SecretStr(KEY),)),
            engine=engine,
            directory=adapters.service,
            routers=(admin.router, rollouts.router, evaluations.router),
            evaluations=service,
        )
        with serving(api.app) as (host, port):
            monkeypatch.setenv("MANYHATS_URL", f"http://{host}:{port}")
            monkeypatch.setenv("MANYHATS_KEY", KEY)
            monkeypatch.setenv("COLUMNS", "200")

            def run(*words, code=0):
                result = CliRunner().invoke(cli.app, ["adapters", *map(str, words)])
                assert result.exit_code == code, result.output
                return result.output

            for seed in range(2):
                folder = write_adapter(adapters.root / f"a-{seed}", seed)
                run("register", "a", folder, *(["--no-promote"] if seed else []))
            yield run


def test_evaluate_and_promote(run, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    (tmp_path / "r.jsonl").write_text('{"prompt": "p", "must_match": "a@"}\n')
    asked = run(
        "gate", "a", "--data", tmp_path / "d.jsonl", "--rules", tmp_path / "r.jsonl",
        "--thresholds", '{"general_divergence": 3, "calibration_error": null}',
    )  # fmt: skip
    assert "a: 1 pairs of its own, 56 general ones, 1 rules; promotion requires: none" in asked
    assert "not judged" in asked
    assert run("gate", "a") == asked
    good = run("evaluate", "a@1", "--wait")
    assert "FAILED" not in good
    for word in ("own_perplexity_to_base", "at most 1.05", "rules_kept", "at least 1", "passed in"):
        assert word in good
    bad = run("evaluate", "a", "--wait", code=2)
    assert "a@2, against a@1" in bad
    row = next(line for line in bad.splitlines() if "general_divergence" in line)
    assert ("8" in row, "at most 3" in row, "FAILED" in row) == (True, True, True)
    refused = run("promote", "a", 2, code=1)
    assert "a@2 has failed its evaluation: own_perplexity_to_stable 4915 (at most 1.1)" in refused
    assert "reason" in run("promote", "a", 2, "--force", code=1)
    assert run("promote", "a", 2, "--force", "--reason", "so be it") == "a: stable 2\n"


def test_json_and_errors(run, tmp_path):
    run("gate", "a", "--thresholds", '{"general_divergence": 3, "calibration_error": null}')
    report = json.loads(run("evaluate", "a@1", "--wait", "--json"))
    assert report["report"]["passed"] is True
    assert json.loads(run("evaluate", "a@2", "--json"))["total"] == 168
    assert "no version 9" in run("evaluate", "a@9", code=1)
    assert "line 1 is not JSON" in run("gate", "a", "--data", __file__, code=1)
    assert "No such file" in run("gate", "a", "--data", tmp_path / "none", code=1)
    assert "thresholds" in run("gate", "a", "--thresholds", '{"x": 1}', code=1)
    assert "promotion requires: evaluated" in run("gate", "a", "--require", "evaluated")
