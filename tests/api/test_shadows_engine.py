"""A shadow over the real engine: of the same weights it says the same, and scores it the same."""

from __future__ import annotations

import asyncio
import copy
import time

import pytest
from support.engine import LocalEngine, assert_at_rest, base_of, params
from support.models import tiny_model, tiny_tokenizer
from support.random_parts import random_adapter

from manyhats.api.outputs import outputs
from manyhats.api.prompts import Job
from manyhats.api.shadows import Shadows
from manyhats.metrics import Metrics
from manyhats.types import DEFAULT_TENANT, GenerationRequest

PROMPT = (5, 9, 33, 7, 12, 60)
TOKENS = 12


class Fixed:
    """Every request has this shadow."""

    def __init__(self, ref) -> None:
        self._ref = ref

    def sample(self, model, tenant, served):
        return self._ref


@pytest.mark.parametrize("shadow", ["same", "second"])
def test_what_is_measured_is_what_the_shadow_says(tmp_path, shadow):
    base = base_of(copy.deepcopy(tiny_model("llama")), tiny_tokenizer())
    known = {"live": random_adapter("everything", base.spec)}
    known["second"] = random_adapter("soft prompt", base.spec)
    known["same"] = known["live"]
    metrics = Metrics(10)
    with LocalEngine(base, tmp_path, known) as engine:
        client = engine.engine.client
        engine.engine.loop._deliver = client._postbox.deliver
        ref = engine.ref("live")
        shadows = Shadows(Fixed(engine.ref(shadow)), client, metrics.shadow)

        async def run():
            sampling = params(TOKENS, ignore_eos=True, logprobs=0, temperature=0.0)
            request = GenerationRequest(
                "r", DEFAULT_TENANT, PROMPT, (sampling,), ref, time.monotonic()
            )
            job = Job("j", 0, "a", "fp", ref, (request,), 1, False)
            found = [delta async for _, delta in shadows.beside(job, outputs(client, job))]
            await asyncio.gather(*shadows._running)
            return [entry.logprob for delta in found for entry in delta.logprobs]

        logprobs = asyncio.run(run())
        assert_at_rest(engine)
    assert len(logprobs) == TOKENS

    def value(name):
        return metrics.registry.get_sample_value(f"manyhats_shadow_{name}", {"adapter": shadow})

    assert value("tokens_total") == TOKENS
    if shadow == "same":
        assert value("agreement_sum") == 1
        assert value("nll_sum") == pytest.approx(-sum(logprobs) / TOKENS, abs=1e-4)
    else:
        assert value("agreement_sum") < 1
        assert value("nll_sum") > -sum(logprobs) / TOKENS
