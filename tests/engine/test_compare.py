"""Teacher-forced comparison against transformers' own model, and background work in the engine."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import replace

import pytest
import torch
from support.engine import LocalEngine, assert_at_rest, base_of, params
from support.models import VOCAB, greedy, tiny_model, tiny_tokenizer
from support.oracle import Oracle
from support.random_parts import random_adapter

from manyhats.adapters.parts import CompiledAdapter
from manyhats.engine.compare import LaneProbe, _divergence
from manyhats.engine.interface import CompareRequest, LaneScores
from manyhats.errors import (
    AdapterLoadError,
    ContextLengthError,
    DrainingError,
    EngineFailedError,
    QueueFullError,
    RequestError,
)
from manyhats.types import DEFAULT_TENANT, AdapterRef, Priority

KINDS = ("everything", "prefix", "soft prompt")
TOKENS = tuple(torch.randint(3, VOCAB, (150,), generator=torch.Generator().manual_seed(4)).tolist())
START = 21


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def base(model):
    return base_of(copy.deepcopy(model), tiny_tokenizer())


@pytest.fixture(scope="module")
def adapters(base):
    return {kind: random_adapter(kind, base.spec) for kind in KINDS}


def served(base, home, adapters, **settings) -> LocalEngine:
    """An engine whose deltas go to its client."""
    engine = LocalEngine(base, home, adapters, **settings)
    engine.engine.loop._deliver = engine.engine.client._postbox.deliver
    return engine


def compare(engine: LocalEngine, *lanes: str | None, start=START, tokens=TOKENS, others_from=0):
    refs = tuple(engine.ref(lane) if lane else None for lane in lanes)
    request = CompareRequest(DEFAULT_TENANT, tokens, start, refs, others_from)
    return asyncio.run(engine.engine.client.compare(request))


def expected(oracle: Oracle, adapter: CompiledAdapter | None) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 log-probabilities [answer, V] and the mean of what the head was given."""
    seen: list[torch.Tensor] = []
    head = oracle._model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    logits = oracle.logits(TOKENS, adapter)
    hook.remove()
    rows = slice(-len(TOKENS) + START - 1, -1)
    return torch.log_softmax(logits[START - 1 : -1].float(), -1), seen[0][rows].mean(0)


def assert_scores(got: LaneScores, logp: torch.Tensor, hidden: torch.Tensor) -> None:
    p, answer = logp.exp(), torch.tensor(TOKENS[START:])
    own = logp.gather(1, answer[:, None])[:, 0]
    assert got.logprobs == pytest.approx(own.tolist(), abs=2e-4)
    assert got.top_ids == tuple(logp.argmax(-1).tolist())
    assert got.confidences == pytest.approx(p.max(-1).values.tolist(), abs=1e-4)
    assert got.entropies == pytest.approx((-(p * logp).sum(-1)).tolist(), abs=5e-4)
    assert got.hidden_mean == pytest.approx(hidden.tolist(), abs=1e-4)


@pytest.mark.parametrize(("chunk", "lanes"), [(512, KINDS), (9, KINDS[:2]), (70, KINDS[2:])])
def test_each_lane_and_its_divergence_are_those_of_transformers(
    base, model, adapters, home, chunk, lanes
):
    oracle = Oracle(model, base.spec)
    settings = {"max_step_tokens": chunk, "max_num_seqs": 4}
    with served(base, home, adapters, **settings) as engine:
        first, *others = compare(engine, lanes[0], None, *lanes[1:])
        assert_at_rest(engine)
    p, hidden = expected(oracle, adapters[lanes[0]])
    assert_scores(first, p, hidden)
    assert (first.divergences, first.agreements) == ((), ())
    for got, name in zip(others, (None, *lanes[1:]), strict=True):
        q, hidden = expected(oracle, adapters[name] if name else None)
        assert_scores(got, q, hidden)
        divergence = (p.exp() * (p - q)).sum(-1)
        assert float(divergence.max()) > 0.01
        assert got.divergences == pytest.approx(divergence.tolist(), abs=5e-4)
        agree = (p.argmax(-1) == q.argmax(-1)).tolist()
        assert got.agreements == tuple(agree)
        assert False in agree


def test_a_lane_does_not_diverge_from_itself(base, adapters, home):
    with served(base, home, adapters) as engine:
        _, same = compare(engine, "everything", "everything", start=1)
    assert max(same.divergences) < 1e-6
    assert all(same.agreements)
    assert len(same.divergences) == len(TOKENS) - 1


@pytest.mark.parametrize("chunk", [512, 9])
def test_others_may_be_scored_over_the_prompt_as_well(base, adapters, home, chunk):
    """The prompt's scores before what is the same without them; a few logits at a time."""
    with served(base, home, adapters, max_step_tokens=chunk, max_num_seqs=4) as engine:
        own, other = compare(engine, "everything", None)
        _, alone = compare(engine, None, None, start=3)
        same, longer = compare(engine, "everything", None, others_from=3)
    assert same == own
    assert longer.logprobs == pytest.approx(alone.logprobs, abs=1e-5)
    assert longer.entropies == pytest.approx(alone.entropies, abs=1e-5)
    assert longer.hidden_mean == pytest.approx(alone.hidden_mean, abs=1e-5)
    assert longer.divergences == pytest.approx(other.divergences, abs=1e-5)
    assert longer.agreements == other.agreements


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_do_not_depend_on_how_the_rows_come(dtype, monkeypatch):
    """Rows in pieces that straddle the answer's beginning, and looked at one by one or together."""
    generator = torch.Generator().manual_seed(1)
    logits = [torch.randn(11, 40, generator=generator).mul(4).to(dtype) for _ in range(2)]
    hidden, targets = torch.randn(11, 3, generator=generator), tuple(range(5, 16))
    kept = [rows.clone() for rows in logits]
    got = []
    for cached, pieces in ((40, (2, 4, 5)), (1 << 18, (11,)), (120, (1, 1, 1, 8))):
        monkeypatch.setattr("manyhats.engine.compare._CACHED", cached)
        first = LaneProbe(None, targets[4:], keep=True)
        first.rows(logits[0][4:], hidden[4:])
        other, begin = LaneProbe(None, targets, first=first), 0
        for size in pieces:
            other.rows(logits[1][begin : begin + size], hidden[begin : begin + size])
            begin += size
        got.append(other.scores())
    p, q = (torch.log_softmax(rows.double(), -1) for rows in logits)
    for scores in got:
        divergence = (p.exp() * (p - q)).sum(-1)[4:]
        assert scores.divergences == pytest.approx(divergence.tolist(), abs=1e-5)
        assert scores.entropies == pytest.approx((-q * q.exp()).sum(-1).tolist(), abs=1e-5)
        assert scores.confidences == pytest.approx(q.exp().amax(-1).tolist(), abs=1e-6)
        own = q.gather(1, torch.tensor(targets)[:, None])[:, 0]
        assert scores.logprobs == pytest.approx(own.tolist(), abs=1e-5)
    for rows, before in zip(logits, kept, strict=True):
        assert torch.equal(rows, before)


def test_divergence_counts_nothing_where_the_first_allows_nothing():
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]).log()
    q = torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log()
    assert _divergence(p, q).tolist() == pytest.approx(
        [0.5 * 0.6931472, 0.6931472, float("inf")], abs=1e-6
    )


def test_what_cannot_be_compared_is_refused(base, adapters, home):
    long = replace(base, context_len=100)
    with served(long, home, adapters, compare_mb=1) as engine:
        bound = engine.engine.client.max_compared_tokens
        assert bound == (1 << 20) // (VOCAB * 4)
        many = TOKENS * (bound // len(TOKENS) + 2)
        for kwargs, error, word in (
            ({"start": 0}, RequestError, "answer_start is 0"),
            ({"start": len(TOKENS)}, RequestError, "answer_start is 150 of 150"),
            ({"tokens": many}, RequestError, "compare_mb"),
            ({"others_from": START + 1}, RequestError, r"others_from is 22; .* 1 to answer_start"),
            ({"others_from": -1}, RequestError, "others_from is -1"),
            ({}, ContextLengthError, "over the context of 100"),
        ):
            with pytest.raises(error, match=word):
                compare(engine, None, None, **kwargs)
        with pytest.raises(RequestError, match="at least one lane"):
            compare(engine)
        assert_at_rest(engine)


def test_an_adapter_that_overflows_or_is_lost_fails_alone(base, adapters, home):
    bad = copy.deepcopy(adapters["everything"])
    for parts in bad.sites.values():
        if parts.low_rank is not None:
            parts.low_rank.b.fill_(1e38)
    known = {"bad": bad}
    with served(base, home, known) as engine:
        with pytest.raises(EngineFailedError, match="bad@1"):
            compare(engine, None, "bad")
        lost = AdapterRef("lost", 1, adapters["prefix"].digest)
        request = CompareRequest(DEFAULT_TENANT, TOKENS, START, (lost,))
        with pytest.raises(AdapterLoadError):
            asyncio.run(engine.engine.client.compare(request))
        assert len(compare(engine, None)) == 1
        assert_at_rest(engine)


def test_rows_that_are_missing_are_a_defect():
    with pytest.raises(RuntimeError, match="0 of 2 rows"):
        LaneProbe(None, (3, 4)).scores()


def test_background_work_is_no_live_request(base, model, home):
    """The same tokens as live, absent from the figures of live requests, its queue bounded."""
    with LocalEngine(base, home, max_background=2) as engine:
        sampling = params(6, ignore_eos=True)
        with engine.together():
            ids = [
                engine.submit(TOKENS[:9], sampling, priority=Priority.BACKGROUND) for _ in range(2)
            ]
            with pytest.raises(QueueFullError, match="max_background"):
                engine.submit(TOKENS[:9], sampling, priority=Priority.BACKGROUND)
            live = engine.submit(TOKENS[:5], sampling)
        for outputs in engine.wait(*ids):
            assert outputs[0].token_ids == greedy(model, list(TOKENS[:9]), 6)
        engine.wait(live)
        name = "manyhats_requests_total"
        total = sum(
            s.value
            for family in engine.metrics.registry.collect()
            for s in family.samples
            if s.name == name
        )
        assert total == 1
        assert_at_rest(engine)
    with pytest.raises(DrainingError):
        compare(engine, None)
