"""Verdicts and reports are the registry's: of every server, after a restart, and in the log."""

from __future__ import annotations

import asyncio
import json
from contextlib import contextmanager

import pytest
import redis
from support.adapter_service import open_adapters, write_adapter
from support.fake_engine import FakeEngine

from manyhats.errors import ConflictError, ModelNotFoundError
from manyhats.lifecycle.audit import Cause
from manyhats.lifecycle.evaluation.gate import Thresholds
from manyhats.lifecycle.evaluation.service import EvaluationService
from manyhats.lifecycle.evaluation.store import EvaluationStore
from manyhats.lifecycle.states import Require, State
from manyhats.types import DEFAULT_TENANT as T
from manyhats.types import TenantId

WHY = Cause("alice", "because")
DATA = '{"prompt": "p", "completion": "é"}'


@pytest.fixture(params=["sqlite", "redis"])
def server(request, tmp_path):
    """Starts a server over the same adapters: (adapters, evaluations). One at a time for SQLite."""
    url = request.getfixturevalue("redis_url") if request.param == "redis" else None
    if url:
        with redis.Redis.from_url(url) as client:
            client.flushall()

    @contextmanager
    def start():
        with open_adapters(tmp_path / "home", redis_url=url) as adapters:
            store = EvaluationStore(adapters.registry)
            told = {}
            service = EvaluationService(
                FakeEngine(), adapters.service, store, lambda name, *rest: told.update({name: rest})
            )
            service.told = told
            adapters.service.rollouts.gate = service.objection
            yield adapters, service

    start.shared = url is not None
    return start


def register(adapters, seed: int) -> None:
    folder = write_adapter(adapters.root / f"a-{seed}", seed)
    adapters.service.register_folder("a", str(folder), tenant=T)


def evaluate(service: EvaluationService, version: int) -> dict:
    """The fake engine's second version of a name is far from its base."""

    async def run():
        await service.start("a", T, version, WHY)
        await service._jobs["default", "a", version].task

    asyncio.run(run())
    return service.shown("a", T, version)


def test_a_verdict_is_known_to_the_next_server_and_to_the_other_one(server):
    with server() as (adapters, service):
        register(adapters, 0)
        register(adapters, 1)
        service.configure("a", T, WHY, data=DATA, require=Require.EVALUATED)
        service.configure("a", T, WHY, thresholds=Thresholds(general_divergence=3.0))
        reports = [evaluate(service, version) for version in (1, 2)]
        assert [found["state"] for found in reports] == ["ready", "rejected"]
        if server.shared:
            with server() as other:
                check(*other, reports)
    with server() as again:
        check(*again, reports)


def check(adapters, service, reports) -> None:
    assert [service.shown("a", T, version) for version in (1, 2)] == reports
    [(values, passed)] = service.told.values()
    assert (values["general_divergence"], passed) == (8, False)
    settings = service.settings("a", T)
    assert (len(settings.data), settings.require) == (1, Require.EVALUATED)
    assert settings.thresholds == Thresholds(general_divergence=3.0)
    assert service.objection("a", T, 1) is None
    assert "own_perplexity_to_base 4915 (at most 1.05)" in service.objection("a", T, 2)
    with pytest.raises(ConflictError, match="a@2 has failed its evaluation"):
        adapters.service.rollouts.promote("a", T, WHY, 2)
    with pytest.raises(ModelNotFoundError):
        service.shown("a", TenantId("other"), 1)


def test_the_log_has_who_asked_what_was_judged_and_by_what(server):
    with server() as (adapters, service):
        register(adapters, 0)
        register(adapters, 1)
        service.configure("a", T, WHY, data=DATA, thresholds=Thresholds(rules_kept=None))
        evaluate(service, 2)
        gate, evaluated = adapters.registry.audit(name="a")[2:]
        assert (gate.action, gate.actor, gate.reason) == ("gate", "alice", "because")
        assert gate.before == {"thresholds": {}, "require": "none"}
        assert gate.after["thresholds"] == {"rules_kept": None}
        assert len(gate.after["data"]) == 64
        assert (evaluated.action, evaluated.actor) == ("evaluate", "alice")
        states = [side["state"] for side in (evaluated.before, evaluated.after)]
        assert states == ["checked", "rejected"]
        assert any("general_divergence" in words for words in evaluated.after["failed"])
        json.dumps(evaluated.shown())


def test_a_state_outlives_retirement_and_goes_with_its_version(server):
    with server() as (adapters, service):
        rollouts, registry = adapters.service.rollouts, adapters.registry
        register(adapters, 0)
        register(adapters, 1)
        register(adapters, 2)
        evaluate(service, 1)
        assert registry.entry("a").get(1).state is State.EVALUATED
        service.configure("a", T, WHY, require=Require.READY)
        assert "on pairs or rules of its own, which 'a' requires" in service.objection("a", T, 1)
        service.configure("a", T, WHY, data=DATA)
        evaluate(service, 1)
        assert service.objection("a", T, 1) is None
        rollouts.retire("a", T, WHY, 1)
        assert registry.entry("a").get(1).state is State.RETIRED
        rollouts.retire("a", T, WHY, 1, retired=False)
        assert registry.entry("a").get(1).state is State.READY
        assert registry.text("a", 1) is not None
        adapters.service.delete("a@1", T, force=True)
        assert registry.text("a", 1) is None
        assert registry.text("a", "data") is not None
        adapters.service.delete("a", T, force=True)
        assert registry.store.dump().texts == {}
        register(adapters, 3)
        assert service.settings("a", T).require is Require.NONE
