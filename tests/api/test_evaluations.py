"""Evaluations over a real application and a tiny model: measured, judged, enforced."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest
from support.application import tiny_application, tiny_base
from support.random_lora import write_random_lora

from manyhats.app import Application
from manyhats.types import DEFAULT_TENANT

DATA = "\n".join(
    json.dumps({"prompt": f"w{i} w9 w{i + 3}", "completion": f" w{i + 7} w{i + 2}"})
    for i in range(5, 11)
)
GENERAL = 56


class Client:
    """Requests to one running application."""

    def __init__(self, application: Application, http: httpx.AsyncClient, root: Path) -> None:
        self.application = application
        self.http = http
        self.root = root

    async def call(self, method: str, path: str, body=None, status: int = 200, **options):
        answer = await self.http.request(
            method,
            f"/admin/adapters{path}",
            **({"json": body} if body is not None else {}),
            **options,
        )
        assert answer.status_code == status, answer.text
        return answer.json()

    async def register(self, name: str, seed: int, scale: float, status: int = 201, **said):
        folder = self.root / f"{name}-{seed}"
        write_random_lora(
            folder,
            self.root / "base",
            rank=4,
            targets=("q_proj", "v_proj", "down_proj"),
            seed=seed,
            scale=scale,
        )
        return await self.call("POST", "", {"name": name, "path": str(folder), **said}, status)

    async def evaluate(self, name: str, version: int | None = None):
        """The version's evaluation once it has ended."""
        body = {} if version is None else {"version": version}
        started = await self.call("POST", f"/{name}/evaluate", body, 202)
        assert started["state"] == "evaluating"
        _, _, number = started["adapter"].partition("@")
        service = self.application.api.state.manyhats.evaluations
        await service._jobs[DEFAULT_TENANT, name, int(number)].task
        found = await self.call("GET", f"/{name}/versions/{number}/evaluation")
        return started, found


def served(tmp_path: Path, scenario: Callable[[Client], Awaitable[None]], **settings) -> None:
    """Runs a scenario against an application over a tiny model."""
    base, roots = tiny_base(tmp_path / "base"), (tmp_path,)

    async def run(application: Application) -> None:
        transport = httpx.ASGITransport(application.api, client=("127.0.0.1", 1))
        async with (
            application.api.router.lifespan_context(application.api),
            httpx.AsyncClient(transport=transport, base_url="http://test") as http,
        ):
            await scenario(Client(application, http, tmp_path))

    with tiny_application(base, tmp_path / "home", adapter_root=roots, **settings) as application:
        asyncio.run(run(application))


def rows(found) -> dict[str, dict]:
    return {row["measure"]: row for row in found["report"]["rows"]}


def test_noise_is_measured_refused_and_promoted_by_force_alone(tmp_path):
    async def scenario(client: Client) -> None:
        bounds = {"calibration_error": None, "general_divergence": 0.3}
        await client.register("a", 1, 0.01)
        asked = await client.call("PUT", "/a/evaluation", {"data": DATA, "thresholds": bounds})
        assert (asked["data"], asked["general"], asked["rules"]) == (6, GENERAL, 0)
        started, good = await client.evaluate("a")
        assert started["total"] == 6 + 3 * GENERAL
        assert (good["state"], good["report"]["passed"]) == ("ready", True)
        assert good["report"]["against"] is None
        drift = await client.call("GET", "/a/drift")
        seen = drift["versions"][0]["signals"]
        assert [(o["by"], o["passed"]) for o in drift["validation"]["series"]] == [
            ("evaluation", True)
        ]
        assert {seen[n]["evaluation"]["reference"]["count"] for n in ("kl", "prompt_tokens")} == {6}
        assert seen["output_tokens"]["evaluation"]["reference"]["mean"] == pytest.approx(2)
        assert "own_perplexity_to_stable" not in rows(good)
        assert rows(good)["own_perplexity_to_base"]["value"] == pytest.approx(1, abs=0.05)

        await client.register("a", 2, 1.5, promote=False)
        _, bad = await client.evaluate("a", 2)
        assert (bad["state"], bad["report"]["passed"]) == ("rejected", False)
        assert bad["report"]["against"] == "a@1"
        failed = {name for name, row in rows(bad).items() if not row["passed"]}
        assert "general_divergence" in failed
        assert rows(bad)["general_divergence"]["value"] > 0.3
        assert rows(good)["general_divergence"]["value"] < 0.01
        assert "own_perplexity_to_stable" in rows(bad)
        lanes = bad["report"]["lanes"]
        assert set(lanes) == {"candidate", "stable", "base"}
        ratio = lanes["candidate"]["own"]["perplexity"] / lanes["base"]["own"]["perplexity"]
        assert rows(bad)["own_perplexity_to_base"]["value"] == pytest.approx(ratio)

        shown = await client.call("GET", "/a/versions/2")
        assert (shown["version"], shown["evaluation"]["state"]) == (2, "rejected")
        text = (await client.http.get("/metrics")).text
        assert 'manyhats_evaluation_passed{adapter="a"} 0.0' in text
        assert 'manyhats_evaluation{adapter="a",measure="general_divergence"}' in text

        for path, body in (
            ("promote", {"version": 2}),
            ("canary", {"version": 2, "percent": 5}),
            ("canary", {"version": 2, "schedule": {"step_s": 1}}),
        ):
            refused = await client.call("POST", f"/a/{path}", body, 409)
            assert "a@2 has failed its evaluation: " in refused["error"]["message"]
            assert "general_divergence" in refused["error"]["message"]
        await client.call("POST", "/a/promote", {"version": 2, "force": True}, 400)
        forced = {"version": 2, "force": True, "reason": "a demonstration"}
        route = (await client.call("POST", "/a/promote", forced))["route"]
        assert route["stable"] == 2
        log = (await client.http.get("/admin/audit")).json()["data"]
        assert log[-1]["reason"].startswith("a demonstration [forced: a@2 has failed")

    served(tmp_path, scenario)


def test_a_name_may_require_an_evaluation(tmp_path):
    async def scenario(client: Client) -> None:
        await client.register("a", 1, 0.01)
        bounds = {"calibration_error": None}
        await client.call("PUT", "/a/evaluation", {"require": "evaluated", "thresholds": bounds})
        refused = await client.register("a", 2, 0.01, status=409, promote=True)
        assert "requires an evaluation" in refused["error"]["message"]
        assert not (await client.register("a", 2, 0.01))["stable"]
        refused = await client.call("POST", "/a/promote", {"version": 2}, 409)
        assert "was not evaluated" in refused["error"]["message"]
        await client.call("GET", "/a/versions/2/evaluation", status=404)
        _, found = await client.evaluate("a")
        assert found["state"] == "evaluated"
        assert (await client.call("POST", "/a/promote", {"version": 2}))["route"]["stable"] == 2
        await client.call("DELETE", "/a?force=true")
        await client.register("a", 3, 0.01)
        asked = await client.call("GET", "/a/evaluation")
        assert (asked["require"], asked["data"]) == ("none", 0)

    served(tmp_path, scenario)


def test_data_comes_with_the_version_and_is_checked_before_it(tmp_path):
    async def scenario(client: Client) -> None:
        folder = write_random_lora(
            tmp_path / "up", tmp_path / "base", rank=2, targets=("q_proj",), seed=5
        )

        async def upload(data: str, status: int):
            files = {
                "config": (folder / "adapter_config.json").read_bytes(),
                "weights": (folder / "adapter_model.safetensors").read_bytes(),
            }
            parts = {"name": "up", "evaluation": data}
            return await client.call("POST", "", None, status, data=parts, files=files)

        refused = await upload(DATA + '\n{"prompt": "w5"}', 400)
        assert "data: line 7: completion is missing" in refused["error"]["message"]
        await client.call("GET", "/up", status=404)
        long = json.dumps({"prompt": "w5", "completion": "w6 " * 3000})
        refused = await upload(long, 400)
        assert "data: pair 1: 3001 tokens" in refused["error"]["message"]
        await upload(DATA, 201)
        assert (await client.call("GET", "/up/evaluation"))["data"] == 6
        other = {"headers": {"x-manyhats-tenant": "other"}}
        await client.call("GET", "/up/evaluation", status=404, **other)
        await client.call("POST", "/up/evaluate", {}, 404, **other)

    served(tmp_path, scenario)


def test_rules_are_held_against_what_the_version_says(tmp_path):
    async def scenario(client: Client) -> None:
        await client.register("a", 1, 0.01)
        rules = [
            {"prompt": "w5 w6", "must_match": r"w\d+", "max_tokens": 4},
            {"prompt": "w5 w6", "must_not_match": r"w\d+", "max_tokens": 4},
        ]
        text = "\n".join(map(json.dumps, rules))
        await client.call("PUT", "/a/evaluation", {"rules": text})
        _, found = await client.evaluate("a")
        assert rows(found)["rules_kept"]["value"] == 0.5
        assert found["report"]["rules"]["kept"] == 1
        [broken] = found["report"]["rules"]["broken"]
        assert broken["rule"] == 2
        assert broken["broken"].startswith("must_not_match: ")
        assert found["state"] == "rejected"

    served(tmp_path, scenario)


def test_an_evaluation_that_cannot_be_done_says_why(tmp_path):
    async def scenario(client: Client) -> None:
        await client.register("a", 1, 1e19)
        _, found = await client.evaluate("a")
        assert found["report"] is None
        assert found["job"]["state"] == "failed"
        assert "a@1" in found["job"]["error"]
        assert (await client.http.get("/healthz")).status_code == 200

    served(tmp_path, scenario, parity_probe=False)


def test_a_version_that_overflows_is_refused_at_registration(tmp_path):
    async def scenario(client: Client) -> None:
        refused = await client.register("a", 1, 1e19, status=400)
        assert "parity_mismatch: " in refused["error"]["message"]
        await client.call("GET", "/a", status=404)
        cache = (await client.http.get("/admin/cache")).json()
        assert (cache["device"]["resident"], cache["host"]["bytes_used"]) == ([], 0)

    served(tmp_path, scenario)
