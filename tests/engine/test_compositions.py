"""Compositions in a batch: each in a slot of its own, derived on the host from its members."""

from __future__ import annotations

import copy

import pytest
from support.engine import LocalEngine, assert_at_rest, base_of, params
from support.models import tiny_model, tiny_tokenizer
from support.oracle import Oracle
from support.random_parts import random_adapter

from manyhats.adapters.compose import compose
from manyhats.adapters.files import AdapterLimits
from manyhats.engine.model.load import BaseModel
from manyhats.errors import AdapterLoadError, AdapterRejectedError
from manyhats.lifecycle.compositions import composed
from manyhats.types import AdapterRef, CompositionKind, Digest

KINDS = (
    "low_rank",
    "bias",
    "scales and more",
    "gated",
    "parallel",
    "gain",
    "prefix",
    "soft prompt",
)
PROMPT = [3, 17, 5, 9, 21, 4, 8]
COUNT = 6
STACK, WEIGHTED = CompositionKind.STACK, CompositionKind.WEIGHTED

WHOLES = (
    (STACK, ("low_rank", "scales and more"), ()),
    (STACK, ("scales and more", "low_rank", "bias"), ()),
    (STACK, ("gated", "parallel"), ()),
    (STACK, ("prefix", "gain", "low_rank"), ()),
    (STACK, ("soft prompt", "soft prompt 2"), ()),
    (WEIGHTED, ("low_rank", "bias", "low_rank 2"), (0.7, -0.5, 0.4)),
)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def base(model) -> BaseModel:
    return base_of(copy.deepcopy(model), tiny_tokenizer())


@pytest.fixture(scope="module")
def adapters(base):
    found = {kind: random_adapter(kind, base.spec) for kind in KINDS}
    return found | {f"{k} 2": random_adapter(k, base.spec, 2) for k in ("low_rank", "soft prompt")}


@pytest.fixture(scope="module")
def oracle(model, base):
    return Oracle(model, base.spec)


def ref_of(adapters, kind, names, weights=()):
    refs = [AdapterRef(n, 1, adapters[n].digest, adapters[n].virtual_tokens) for n in names]
    return composed(kind, refs, weights)


def expected(oracle, adapters, ref):
    by_digest = {a.digest: a for a in adapters.values()}
    members = [by_digest[member.digest] for member in ref.composition.members]
    whole = compose(ref, ref.composition, members, AdapterLimits())
    return oracle.greedy(PROMPT, whole, COUNT)


def test_compositions_members_and_the_base_in_one_batch(base, adapters, oracle, home):
    refs = [ref_of(adapters, *whole) for whole in WHOLES]
    who = [None, "low_rank", *refs, "bias"]
    sampling = params(COUNT, ignore_eos=True, logprobs=0)
    with LocalEngine(base, home, adapters, slots=12, pool_rows=128) as engine:
        found = engine.generate([PROMPT] * len(who), sampling, who)
        worn = {str(r.ref) for r in engine.engine.client.stats().resident}
        assert worn == {"low_rank@1", "bias@1", *map(str, refs)}, "no slot for the other members"
        assert engine.metrics_value("manyhats_generation_tokens_total", adapter="(stack)") == 30
        assert engine.metrics_value("manyhats_generation_tokens_total", adapter="(weighted)") == 6
        assert_at_rest(engine)
    for one, output in zip(who, found, strict=True):
        assert output.error is None, one
        if isinstance(one, AdapterRef):
            tokens, scores = expected(oracle, adapters, one)
        else:
            tokens, scores = oracle.greedy(PROMPT, adapters[one] if one else None, COUNT)
        assert output.token_ids == tokens, one
        wanted = [float(s.max()) for s in scores]
        assert [s.logprob for s in output.logprobs] == pytest.approx(wanted, abs=1e-4), one


def test_a_composition_comes_back_after_it_made_room(base, adapters, home):
    refs = [ref_of(adapters, *whole) for whole in (WHOLES[0], WHOLES[5])]
    with LocalEngine(base, home, adapters, slots=1, pool_rows=64, host_cache_mb=1) as engine:
        first = [engine.generate([PROMPT], params(COUNT), [ref])[0].token_ids for ref in refs]
        again = [engine.generate([PROMPT], params(COUNT), [ref])[0].token_ids for ref in refs]
        assert first == again
        assert first[0] != first[1]
        assert_at_rest(engine)


def test_cached_blocks_are_of_the_same_composition_alone(base, adapters, home):
    prompt = PROMPT * 5
    stack = ref_of(adapters, STACK, ("low_rank", "scales and more"))
    turned = ref_of(adapters, STACK, ("scales and more", "low_rank"))
    with LocalEngine(base, home, adapters, block_size=4) as engine:

        def cached(ref):
            return engine.generate([prompt], params(2), [ref])[0].cached_tokens

        assert [cached(r) for r in (stack, turned, "low_rank", None)] == [0, 0, 0, 0]
        same = ref_of(adapters, STACK, ("low_rank", "scales and more"))
        assert cached(same) == 32


def test_what_cannot_be_composed_fails_alone_and_says_so(base, adapters, home):
    bad = ref_of(adapters, WEIGHTED, ("low_rank", "gated"), (1.0, 1.0))
    mixed = ref_of(adapters, STACK, ("prefix", "soft prompt"))
    with LocalEngine(base, home, adapters, slots=4) as engine:
        who = [bad, "low_rank", mixed, None, bad]
        found = engine.generate([PROMPT] * len(who), params(3), who)
        assert_at_rest(engine)
        assert engine.metrics_value("manyhats_adapter_load_failures_total", adapter="(stack)") == 0
    assert [o.error is None for o in found] == [False, True, False, True, False]
    assert isinstance(found[0].error, AdapterRejectedError)
    assert "gated@1 has bottlenecks at model.layers.0.after_" in found[0].error.message
    assert "soft prompt and a prefix" in found[2].error.message


def test_a_member_that_cannot_be_loaded_is_no_mistake_of_the_caller(base, adapters, home):
    gone = AdapterRef("gone", 1, Digest("0" * 64))
    ref = composed(STACK, [AdapterRef("low_rank", 1, adapters["low_rank"].digest), gone], ())
    with LocalEngine(base, home, adapters) as engine:
        [output] = engine.generate([PROMPT], params(3), [ref])
        assert isinstance(output.error, AdapterLoadError)
        assert engine.metrics_value("manyhats_adapter_load_failures_total", adapter="(stack)") == 1
        assert_at_rest(engine)
