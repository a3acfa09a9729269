"""The whole application over a tiny model: a bad version is canaried and rolled back by itself."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from support.application import tiny_application, tiny_base
from support.random_lora import write_random_lora

TARGETS = ["q_proj", "v_proj", "gate_proj"]


@pytest.fixture
def application(tmp_path):
    """pirate@1 is mild; pirate@2 says anything else, and is no more than a canary."""
    base = tiny_base(tmp_path / "base")
    for seed, scale in ((1, 0.05), (2, 1.5)):
        folder = tmp_path / "adapters" / f"v{seed}"
        write_random_lora(folder, base, rank=4, targets=TARGETS, seed=seed, scale=scale)
    sizes = {
        "drift_share": 1,
        "drift_canary_share": 1,
        "drift_warm_up": 2,
        "drift_reference": 32,
        "drift_window": 32,
        "drift_small_reference": 32,
        "drift_small_window": 32,
    }
    root = tmp_path / "adapters"
    with tiny_application(base, tmp_path / "home", adapter_root=(root,), **sizes) as made:
        yield made, root


def test_a_bad_canary_is_found_by_its_divergence_from_the_base_and_ended(application):
    made, folder = application

    async def ask(client, count, first=0, **headers):
        said = {"model": "pirate", "prompt": "tell me more", "max_tokens": 8}
        answers = [
            await client.post("/v1/completions", json={**said, "seed": i}, headers=headers)
            for i in range(first, first + count)
        ]
        assert {a.status_code for a in answers} == {200}, "no request fails"
        return answers

    def told_of_samples():
        """A queue that gets an entry for each sample that was scored again."""
        scored, rescorer = asyncio.Queue(), made.api.state.manyhats.drift_detection.rescorer
        found = rescorer._found

        def both(*sample):
            found(*sample)
            scored.put_nowait(sample)

        rescorer._found = both
        return scored

    async def run():
        scored = told_of_samples()
        transport = httpx.ASGITransport(made.api)
        context = made.api.router.lifespan_context(made.api)
        async with context, httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            post, path = client.post, "/admin/adapters"
            for version in (1, 2):
                said = {"name": "pirate", "path": str(folder / f"v{version}")}
                made_it = await post(path, json={**said, "promote": version == 1})
                assert made_it.status_code in (200, 201), made_it.text
            policy = {"action": "rollback", "signals": ["kl", "agreement"]}
            await client.put(f"{path}/pirate/drift/policy", json=policy)
            await ask(client, 36)
            for _ in range(36):
                await scored.get()
            canaried = await post(f"{path}/pirate/canary", json={"version": 2, "percent": 5})
            assert canaried.status_code == 200, canaried.text
            chosen = {"x-manyhats-route": "canary"}
            canary = await ask(client, 24, 100, **chosen)
            assert canary[0].headers["x-manyhats-served-by"] == "pirate@2"
            for _ in range(24):
                await scored.get()
            return (await post(f"{path}/pirate/drift/check")).json(), await ask(client, 1, **chosen)

    found, (after,) = asyncio.run(run())
    assert after.headers["x-manyhats-served-by"] == "pirate@1", found["versions"]
    assert found["route"]["canary"] is None
    assert found["alarms"][0]["against"] == "stable"
    kl = found["versions"][0]["signals"]["kl"]
    assert 0 < kl["reference"]["mean"] < 1
    entries = made.adapters.rollouts.audit(name="pirate", after=0, limit=100)
    assert (entries[-1].actor, entries[-1].action) == ("drift", "rollback")
