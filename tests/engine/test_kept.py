"""Logits that live answers leave for a comparison: the same figures as computing them again."""

from __future__ import annotations

import asyncio
import copy
from contextlib import aclosing
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.engine import LocalEngine, assert_at_rest, base_of, params
from support.models import tiny_model, tiny_tokenizer
from support.random_parts import random_adapter

from manyhats.engine.interface import CompareRequest
from manyhats.engine.kept import KeptAnswer, RowBudget
from manyhats.errors import EngineFailedError
from manyhats.types import (
    DEFAULT_TENANT,
    AdapterRef,
    Composition,
    CompositionKind,
    Digest,
    GenerationRequest,
)

PROMPT = tuple(range(5, 30))
KINDS = ("everything", "soft prompt")


@pytest.fixture(scope="module")
def base():
    return base_of(copy.deepcopy(tiny_model("llama")), tiny_tokenizer())


@pytest.fixture(scope="module")
def adapters(base):
    return {kind: random_adapter(kind, base.spec) for kind in KINDS}


class Served(LocalEngine):
    """An engine whose deltas go to its client; ``asked`` has the versions that were run."""

    def __init__(self, base, home, adapters, **settings):
        super().__init__(base, home, adapters, **settings)
        self.client, self.asked = self.engine.client, []
        loop, submit = self.engine.loop, self.engine.loop.submit
        loop._deliver = self.client._postbox.deliver

        def noted(request, probe=None):
            self.asked.append(request.adapter)
            submit(request, probe)

        loop.submit = noted

    @property
    def left(self) -> int:
        return len(self.engine.loop._post._budget)

    async def answers(self, ref, *choices, ident="live", keeps=True, until=None):
        """(tokens, what was kept) of each choice; broken off after ``until`` deltas."""
        request = GenerationRequest(
            ident, DEFAULT_TENANT, PROMPT, choices, ref, 0.0, keeps_logits=keeps
        )
        tokens, kept = [[] for _ in choices], [None] * len(choices)
        seen = 0
        async with aclosing(self.client.generate(request)) as deltas:
            async for delta in deltas:
                assert delta.error is None
                tokens[delta.index] += delta.token_ids
                kept[delta.index] = delta.kept
                seen += 1
                if seen == until:
                    break
        return list(zip(tokens, kept, strict=True))

    async def compare(self, ref, tokens, kept):
        request = CompareRequest(
            DEFAULT_TENANT, (*PROMPT, *tokens), len(PROMPT), (ref, None), 1, kept
        )
        return await self.client.compare(request)


def assert_same(got, want):
    assert got.adapter == want.adapter
    assert got.top_ids == want.top_ids
    for name in ("logprobs", "confidences", "entropies", "divergences"):
        assert getattr(got, name) == pytest.approx(getattr(want, name), abs=2e-4)
    assert got.agreements == want.agreements


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [512, 9])
def test_a_kept_answer_compares_as_one_that_is_scored_again(base, adapters, home, kind, chunk):
    """Several choices beside others that keep nothing, drawn in every way that bends logits."""
    choices = (
        params(12, temperature=1.0, seed=3, ignore_eos=True),
        params(9, logit_bias=((7, 4.0), (9, -100.0)), repetition_penalty=1.3, ignore_eos=True),
        params(5, temperature=0.7, top_k=5, seed=8, min_tokens=4),
    )

    async def run(engine):
        ref = engine.ref(kind)
        beside = engine.answers(ref, params(15, ignore_eos=True), ident="beside", keeps=False)
        answers, [(_, nothing)] = await asyncio.gather(engine.answers(ref, *choices), beside)
        assert nothing is None
        for tokens, kept in answers:
            assert len(kept) == len(tokens)
            assert engine.left == total - sum(len(k) for _, k in answers)
            engine.asked.clear()
            own, other = await engine.compare(ref, tokens, kept)
            assert engine.asked == [None]
            again, both = await engine.compare(ref, tokens, None)
            assert engine.asked == [None, ref, None]
            assert_same(own, again)
            assert_same(other, both)
            assert other.hidden_mean == pytest.approx(both.hidden_mean, abs=1e-4)
            assert own.hidden_mean == ()

    with Served(base, home, adapters, max_step_tokens=chunk, max_num_seqs=6) as engine:
        total = engine.left
        assert total == engine.client.max_compared_tokens
        asyncio.run(run(engine))
        assert engine.left == total
        assert_at_rest(engine)


def test_an_answer_that_lost_its_blocks_is_kept_once(base, adapters, home):
    """Preempted and computed again: each token has the row that it was drawn from."""

    async def run(engine):
        ref = engine.ref("everything")
        choice = params(40, ignore_eos=True)
        many = [engine.answers(ref, choice, ident=f"r{i}") for i in range(4)]
        for [(tokens, kept)] in await asyncio.gather(*many):
            assert len(kept) == len(tokens) == 40
            own, _ = await engine.compare(ref, tokens, kept)
            again, _ = await engine.compare(ref, tokens, None)
            assert_same(own, again)

    with Served(base, home, adapters, kv_cache_mb=None, kv_cache_blocks=40, block_size=4) as engine:
        asyncio.run(run(engine))
        assert engine.metrics_value("manyhats_preemptions_total") > 0
        assert_at_rest(engine)


def test_only_the_same_answer_of_the_same_version_is_taken(base, adapters, home):
    async def run(engine):
        ref = engine.ref("everything")
        [(tokens, kept)] = await engine.answers(ref, params(8, ignore_eos=True))
        for other, answer in (
            (replace(ref, version=2), tokens),
            (None, tokens),
            (ref, tokens[:-1]),
            (ref, [*tokens[:-1], (tokens[-1] + 1) % 50]),
        ):
            engine.asked.clear()
            await engine.compare(other, answer, kept)
            assert engine.asked == [other, None]
        engine.asked.clear()
        await engine.compare(ref, tokens, kept)
        assert engine.asked == [None]

    with Served(base, home, adapters) as engine:
        asyncio.run(run(engine))


def test_what_is_over_the_bound_or_broken_off_is_held_no_longer(base, adapters, home):
    async def run(engine):
        ref = engine.ref("everything")
        engine.engine.loop._post._budget.__init__(20)
        choice = params(12, ignore_eos=True)
        [(tokens, kept)] = await engine.answers(ref, choice)
        [(_, given_up)] = await engine.answers(ref, choice, ident="second")
        assert (len(kept), len(given_up), engine.left) == (12, 0, 8)
        engine.asked.clear()
        await engine.compare(ref, tokens, given_up)
        assert engine.asked == [ref, None]
        await engine.answers(ref, params(6, ignore_eos=True), ident="third", until=3)
        del kept

    with Served(base, home, adapters) as engine:
        asyncio.run(run(engine))
        assert engine.engine.loop.between_steps(lambda: None).result() is None
        assert engine.left == 20
        assert_at_rest(engine)


def test_an_ensemble_keeps_nothing(base, adapters, home):
    async def run(engine):
        members = (engine.ref("everything"), AdapterRef("base", 0, Digest("")))
        ensemble = AdapterRef(
            "both", 1, Digest("e"), 0, Composition(CompositionKind.ENSEMBLE, members)
        )
        [(tokens, kept)] = await engine.answers(ensemble, params(4, ignore_eos=True))
        assert len(tokens) == 4
        assert kept is None

    with Served(base, home, adapters) as engine:
        asyncio.run(run(engine))
        assert_at_rest(engine)


def test_a_row_that_is_not_finite_fails_the_comparison_alone():
    """A grammar may leave a token to draw where the largest logit is infinite."""
    kept = KeptAnswer(None, RowBudget(5))
    for best in (1.0, torch.inf, 2.0):
        kept.drawn(torch.tensor([[0.5, best]]), 0)
    lane = kept.lane(None, [0, 0, 0])
    assert lane.catch_up(1)
    with pytest.raises(EngineFailedError, match="not finite"):
        lane.catch_up(1)


def test_rows_are_looked_at_in_pieces_of_any_size():
    rows = torch.randn(7, 40, generator=torch.Generator().manual_seed(2))
    found = []
    for size in (1, 3, 7, 20):
        kept = KeptAnswer(None, RowBudget(7))
        for number, row in enumerate(rows):
            kept.drawn(row[None], number)
        lane = kept.lane(None, range(7))
        while lane.catch_up(size):
            pass
        found.append(lane.scores())
    logp = torch.log_softmax(rows, -1)
    assert found[0].logprobs == pytest.approx(logp.diagonal().tolist(), abs=1e-5)
    for scores in found[1:]:
        assert scores.logprobs == pytest.approx(found[0].logprobs, abs=1e-6)
        assert scores.top_ids == found[0].top_ids


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=40), st.integers(0, 9))
def test_rows_are_never_over_the_bound_and_all_come_back(steps, rows):
    """Four answers that grow, and now and then end, in any order."""
    budget = RowBudget(rows)
    answers = [KeptAnswer(None, budget) for _ in range(4)]
    for which, ends in steps:
        if ends:
            answers[which] = KeptAnswer(None, budget)
        else:
            answers[which].drawn(torch.tensor([[0.0, 1.0]]), 0)
        assert len(budget) + sum(map(len, answers)) == rows
    answers.clear()
    assert len(budget) == rows
