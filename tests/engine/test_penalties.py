"""Penalties against the definitions, token by token, and against transformers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from manyhats.engine.penalties import Penalties, wants_penalties
from manyhats.engine.sampling import Sampler
from manyhats.types import SamplingParams, Sequence, TenantId

V = 37


def sequence(id_, prompt, output, repetition=1.0, frequency=0.0, presence=0.0):
    params = SamplingParams(
        max_tokens=9,
        seed=1,
        temperature=0.0,
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
    )
    return Sequence(
        id=id_, request_id="r", index=0, tenant=TenantId("t"), params=params, adapter=None,
        arrival=0.0, prompt_len=len(prompt), token_ids=[*prompt, *output],
    )  # fmt: skip


def normal(rows, seed=0):
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3


def naive(row, s):
    """The definitions, with no state and no vectors."""
    out = s.token_ids[s.prompt_len :]
    result = row.tolist()
    for token in set(s.token_ids):
        r = s.params.repetition_penalty
        result[token] = result[token] * r if result[token] < 0 else result[token] / r
    for token in set(out):
        result[token] -= out.count(token) * s.params.frequency_penalty + s.params.presence_penalty
    return torch.tensor(result)


tokens = st.lists(st.integers(0, V - 1), max_size=40)
amounts = st.tuples(
    st.sampled_from([1.0, 0.5, 1.3]), st.sampled_from([0.0, -1.5, 0.7]), st.sampled_from([0.0, 2.0])
)


@given(st.lists(st.tuples(tokens, tokens, amounts), min_size=1, max_size=5), tokens)
def test_they_equal_the_definitions_as_the_outputs_grow(rows, more):
    state = Penalties()
    batch = [sequence(i, p, o, *a) for i, (p, o, a) in enumerate(rows)]
    places = list(range(0, 2 * len(batch), 2))  # every second row of the logits
    for step in range(len(more) + 1):
        raw = normal(2 * len(batch), step)
        found = raw.clone()
        state.apply(found, places, batch)
        for place, s in zip(places, batch, strict=True):
            torch.testing.assert_close(found[place], naive(raw[place], s))
        assert torch.equal(found[1::2], raw[1::2])
        for s in batch:
            s.token_ids += more[step : step + 1]


def test_repetition_is_transformers_own():
    s = sequence(1, [1, 2, 2, 5], [9, 9, 1], repetition=1.7)
    raw = normal(1)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([s.token_ids]), raw.clone())
    Penalties().apply(raw, [0], [s])
    torch.testing.assert_close(raw, expected)


def test_a_masked_token_stays_masked():
    raw = normal(1)
    raw[0, 4] = -torch.inf
    Penalties().apply(raw, [0], [sequence(1, [4], [4], 1.5, 1.0, -1.0)])
    assert raw[0, 4] == -torch.inf


def test_what_is_kept_goes_when_the_sequence_does():
    state = Penalties()
    state.apply(normal(2), [0, 1], [sequence(1, [1], [2], 2.0), sequence(2, [1], [], 2.0)])
    assert len(state) == 2
    state.forget(1)
    state.forget(1)
    state.forget(99)
    assert len(state) == 1


def test_a_shorter_history_is_counted_anew():
    state = Penalties()
    s = sequence(1, [1], [2, 2, 3], frequency=1.0)
    state.apply(normal(1), [0], [s])
    del s.token_ids[2:]
    raw = normal(1)
    found = raw.clone()
    state.apply(found, [0], [s])
    torch.testing.assert_close(found[0], naive(raw[0], s))


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        ((1.0, 0.0, 0.0), False),
        ((1.1, 0.0, 0.0), True),
        ((1.0, -0.1, 0.0), True),
        ((1.0, 0.0, 0.1), True),
    ],
)
def test_only_a_penalty_that_changes_something_is_wanted(params, wanted):
    assert wants_penalties(sequence(1, [], [], *params).params) is wanted


def test_the_sampler_penalizes_what_it_has_generated():
    # With a presence penalty over any gap, greedy decoding takes each token once before any twice.
    sampler = Sampler(V, torch.device("cpu"))
    raw = normal(2)
    first, second = sequence(1, [3], [], presence=100.0), sequence(2, [3], [])
    for _ in range(V):
        found = sampler.sample(raw, [first, second])
        for s, result in zip((first, second), found, strict=True):
            s.token_ids.append(result.token_id)
    assert sorted(first.token_ids[1:]) == list(range(V))
    assert len(set(second.token_ids[1:])) == 1
    sampler.forget(1)
