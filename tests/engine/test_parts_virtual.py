"""Virtual tokens: counted against context and cache, seen by nobody."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from support.engine import LocalEngine, assert_at_rest, base_of, params
from support.models import VOCAB, tiny_model, tiny_tokenizer
from support.oracle import Oracle
from support.random_parts import VIRTUAL, random_adapter

from manyhats.engine.penalties import Penalties
from manyhats.errors import AdapterLoadError, ContextLengthError
from manyhats.types import (
    DEFAULT_TENANT,
    AdapterRef,
    Digest,
    FinishReason,
    SamplingParams,
    Sequence,
)

KINDS = ("prefix", "soft prompt")
PROMPT = torch.randint(3, VOCAB, (19,), generator=torch.Generator().manual_seed(8)).tolist()


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture
def made(model, home):
    """An engine with one adapter of each kind, and the oracle."""
    base = replace(base_of(copy.deepcopy(model), tiny_tokenizer()), context_len=64)
    adapters = {kind: random_adapter(kind, base.spec) for kind in KINDS}
    with LocalEngine(base, home, adapters, block_size=4) as engine:
        yield engine, Oracle(model, base.spec)
        assert_at_rest(engine)


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_scores_are_those_of_the_prompts_own_tokens(made, kind):
    engine, oracle = made
    sampling = params(2, prompt_logprobs=3, ignore_eos=True)
    with engine.together():
        ids = [engine.submit(PROMPT, sampling, adapter=kind) for _ in range(2)]
    expected = torch.log_softmax(oracle.logits(PROMPT, engine.adapters[kind]), -1)
    for (output,) in engine.wait(*ids):
        assert output.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == len(PROMPT)
        assert output.prompt_logprobs[0] is None
        for position, score in enumerate(output.prompt_logprobs[1:]):
            assert score is not None
            assert score.token_id == PROMPT[position + 1]
            for token, logprob in ((score.token_id, score.logprob), *score.top):
                assert logprob == pytest.approx(float(expected[position, token]), abs=1e-3)


def test_prompt_scores_in_chunks(model, home):
    """Chunks that end within the virtual tokens, at their end and behind it."""
    base = base_of(copy.deepcopy(model), tiny_tokenizer())
    adapters = {kind: random_adapter(kind, base.spec) for kind in KINDS}
    oracle = Oracle(model, base.spec)
    for budget in (2, 5, 7):
        settings = {"max_step_tokens": budget, "max_num_seqs": 2}
        with LocalEngine(base, home, adapters, **settings) as engine:
            sampling = params(1, prompt_logprobs=0, ignore_eos=True)
            outputs = engine.generate([PROMPT] * 2, sampling, KINDS)
        for kind, output in zip(KINDS, outputs, strict=True):
            expected = torch.log_softmax(oracle.logits(PROMPT, adapters[kind]), -1)
            found = [s.logprob for s in output.prompt_logprobs[1:]]
            wanted = [float(expected[i, t]) for i, t in enumerate(PROMPT[1:])]
            assert found == pytest.approx(wanted, abs=1e-3), (kind, budget)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_shared_and_only_the_prompts_tokens_are_told(made, kind):
    engine, oracle = made
    sampling = params(3, ignore_eos=True)
    expected, _ = oracle.greedy(PROMPT, engine.adapters[kind], 3)
    first, again = (engine.generate([PROMPT], sampling, [kind])[0] for _ in range(2))
    assert first.token_ids == again.token_ids == expected
    assert first.cached_tokens == 0
    # 5 + 19 tokens in blocks of 4, the last token never out of the cache
    assert again.cached_tokens == 20 - VIRTUAL
    other = [PROMPT[0] + 1, *PROMPT[1:]]
    (shifted,) = engine.generate([other], sampling, [kind])
    assert shifted.token_ids == oracle.greedy(other, engine.adapters[kind], 3)[0]
    assert shifted.cached_tokens == 0, "only a block of virtual tokens was shared"
    (plain,) = engine.generate([PROMPT], sampling)
    assert plain.token_ids == oracle.greedy(PROMPT, None, 3)[0]
    assert plain.cached_tokens == 0


@pytest.mark.parametrize("kind", KINDS)
def test_they_count_against_the_context(made, kind):
    engine, oracle = made
    room = 64 - VIRTUAL - len(PROMPT)
    long, fits = (params(n, ignore_eos=True) for n in (room + 1, room))
    refused, served = engine.generate([PROMPT] * 2, [long, fits], [kind] * 2)
    assert isinstance(refused.error, ContextLengthError)
    assert f"{VIRTUAL} virtual tokens" in refused.error.message
    assert served.token_ids == oracle.greedy(PROMPT, engine.adapters[kind], room)[0]
    assert served.finish_reason is FinishReason.LENGTH


def test_an_adapter_with_another_number_fails_alone(made, monkeypatch):
    engine, oracle = made
    right = engine.ref("prefix")
    monkeypatch.setattr(engine, "ref", lambda name: AdapterRef(name, 1, right.digest, VIRTUAL - 1))
    wrong, plain = engine.generate([PROMPT] * 2, params(2, ignore_eos=True), ["prefix", None])
    assert isinstance(wrong.error, AdapterLoadError)
    assert "5 virtual tokens" in wrong.error.message
    assert plain.token_ids == oracle.greedy(PROMPT, None, 2)[0]


def test_penalties_pass_them_over():
    ref = AdapterRef("a", 1, Digest("0" * 64), 3)
    sampling = SamplingParams(max_tokens=4, seed=0, repetition_penalty=2.0)
    sequence = Sequence(
        1, "r", 0, DEFAULT_TENANT, sampling, ref, 0.0, prompt_len=5, token_ids=[0, 0, 0, 4, 5, 6]
    )
    logits = torch.ones(1, 8)
    Penalties().apply(logits, [0], [sequence])
    assert logits[0].tolist() == [1, 1, 1, 1, 0.5, 0.5, 0.5, 1]
