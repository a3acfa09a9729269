"""The sampler as a whole: order of operations, independence of rows, errors of one row alone."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhats.engine.grammar_mask import GrammarMasks, empty_masks
from manyhats.engine.sampling import RowError, SampledToken, Sampler
from manyhats.errors import EngineFailedError, RequestError
from manyhats.types import AdapterRef, Digest, SamplingParams, Sequence, TenantId

CPU = torch.device("cpu")
V = 1003  # a multiple of no block size


def sequence(id_=0, prompt=(1, 2), output=(), adapter=None, **params):
    params = {"max_tokens": 64, "seed": 7, **params}
    return Sequence(
        id=id_,
        request_id=f"r{id_}",
        index=0,
        tenant=TenantId("t"),
        params=SamplingParams(**params),
        adapter=adapter,
        arrival=0.0,
        prompt_len=len(prompt),
        token_ids=[*prompt, *output],
    )


def logits(rows, vocab=V, seed=0, scale=3.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def tokens(results):
    assert all(isinstance(r, SampledToken) for r in results), results
    return [r.token_id for r in results]


VARIETY = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 5.0, "top_p": 0.99},
    {"temperature": 2.0, "top_k": 300, "top_p": 0.5},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 5000, "min_p": 0.001, "top_p": 0.97},
    {"temperature": 1.0, "repetition_penalty": 1.5, "frequency_penalty": 0.3},
    {"temperature": 0.0, "presence_penalty": 1.0, "logit_bias": ((5, 3.0), (900, -2.0))},
    {"temperature": 1.0, "min_tokens": 10, "stop_token_ids": frozenset({17})},
    {"temperature": 1.0, "logprobs": 3},
]


def variety(count, start=0):
    return [
        sequence(i, prompt=(3, i + 4), output=tuple(range(i % 5)), seed=100 + i, **VARIETY[i % 12])
        for i in range(start, start + count)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [V, 49_152, 7, 256, 512])
def test_greedy_is_the_argmax_lowest_id_first(dtype, vocab):
    raw = logits(6, vocab).to(dtype)
    raw[0] = 2.0  # all equal
    raw[1, 3] = raw[1, vocab - 1] = 90.0
    raw[2, vocab - 1] = 91.0
    raw[3, :] = -torch.inf
    raw[3, 5] = -4.0
    found = Sampler(vocab, CPU).sample(raw, [sequence(i, temperature=0.0) for i in range(6)])
    expected = [np.flatnonzero(r == r.max())[0] for r in raw.float().numpy()]
    assert tokens(found) == expected
    assert expected[:4] == [0, 3, vocab - 1, 5]


def test_a_tiny_temperature_and_top_k_1_are_greedy():
    raw = logits(1)
    raw[0, 10] = raw[0, 700] = 50.0
    sampler = Sampler(V, CPU)
    for i, params in enumerate([{"temperature": 1e-6}, {"top_k": 1}, {"top_k": 1, "seed": 3}]):
        assert tokens(sampler.sample(raw, [sequence(i, **params)])) == [10]


def test_a_very_low_or_high_temperature_stays_finite():
    sampler = Sampler(V, CPU)
    raw = logits(1, scale=30.0)
    assert tokens(sampler.sample(raw, [sequence(1, temperature=1e-5)])) == [int(raw.argmax())]
    drawn = {
        tokens(sampler.sample(raw, [sequence(10 + s, temperature=1e30, seed=s)]))[0]
        for s in range(200)
    }
    assert len(drawn) > 150


@settings(max_examples=20)
@given(st.data())
def test_who_shares_the_batch_changes_nothing(data):
    everyone = variety(24)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    raw = logits(24, seed=data.draw(st.integers(0, 50))).to(dtype)
    alone = [Sampler(V, CPU).sample(raw[i : i + 1], [s])[0] for i, s in enumerate(everyone)]
    order = data.draw(st.permutations(range(24)))
    rows = order[: data.draw(st.integers(1, 24))]
    together = Sampler(V, CPU).sample(raw[rows], [everyone[i] for i in rows])
    assert together == [alone[i] for i in rows]


def test_one_row_equals_many_on_a_large_vocabulary():
    # Sizes at which torch splits reductions over threads.
    vocab = 49_152
    everyone = variety(12)
    raw = logits(12, vocab, seed=4)
    together = Sampler(vocab, CPU).sample(raw, everyone)
    alone = Sampler(vocab, CPU)
    assert together == [alone.sample(raw[i : i + 1], [s])[0] for i, s in enumerate(everyone)]


def test_the_token_depends_on_seed_and_position_not_on_the_sampler_s_past():
    raw = logits(1)
    sampler = Sampler(V, CPU)
    first = [tokens(sampler.sample(raw, [sequence(1, output=range(n))]))[0] for n in range(40)]
    again = [
        tokens(Sampler(V, CPU).sample(raw, [sequence(9, output=range(n))]))[0] for n in range(40)
    ]
    other = [
        tokens(sampler.sample(raw, [sequence(2, seed=8, output=range(n))]))[0] for n in range(40)
    ]
    assert first == again
    assert first != other
    assert len(set(first)) > 5


def test_draws_follow_the_distribution():
    # Chi-square with 4,000 fixed seeds against the exact probabilities, plain and filtered.
    draws = 4000
    raw = logits(1, vocab=300, scale=1.5)
    sampler = Sampler(300, CPU)
    for params, keep in [({"temperature": 0.8}, 300), ({"temperature": 1.2, "top_k": 12}, 12)]:
        scaled = raw[0].double() / params["temperature"]
        cut = scaled.sort(descending=True).values[keep - 1]
        p = torch.where(scaled >= cut, scaled, -torch.inf).softmax(0)
        batch = [sequence(i, seed=i, **params) for i in range(draws)]
        seen = Counter(tokens(sampler.sample(raw.expand(draws, -1), batch)))
        assert all(p[t] > 0 for t in seen)
        common = [t for t in range(300) if p[t] * draws >= 5]
        rest = draws - sum(seen[t] for t in common)
        expected_rest = draws - float(sum(p[t] * draws for t in common))
        chi = sum((seen[t] - float(p[t]) * draws) ** 2 / (float(p[t]) * draws) for t in common)
        if expected_rest > 5:
            chi += (rest - expected_rest) ** 2 / expected_rest
        freedom = len(common)
        assert chi < freedom + 4 * (2 * freedom) ** 0.5


def test_logit_bias_forces_and_forbids():
    raw = logits(2, scale=1.0)
    best = int(raw[1].argmax())
    batch = [
        sequence(1, logit_bias=((1002, 100.0),)),
        sequence(2, temperature=0.0, logit_bias=((best, -100.0),)),
    ]
    before = raw.clone()
    found = tokens(Sampler(V, CPU).sample(raw, batch))
    assert found == [1002, int(raw[1].argsort(descending=True)[1])]
    assert torch.equal(raw, before)  # the caller's logits stay as they were


def test_a_bias_for_a_token_that_does_not_exist_fails_its_own_row():
    found = Sampler(V, CPU).sample(
        logits(2), [sequence(1, logit_bias=((V, 1.0),)), sequence(2, temperature=0.0)]
    )
    assert isinstance(found[0], RowError)
    assert isinstance(found[0].error, RequestError)
    assert found[0].error.param == "logit_bias"
    assert str(V) in found[0].error.message
    assert isinstance(found[1], SampledToken)


def test_min_tokens_holds_back_the_ends_until_it_is_reached():
    raw = logits(1, scale=1.0)
    raw[0, 17], raw[0, 2], raw[0, 40] = 80.0, 70.0, 60.0
    sampler = Sampler(V, CPU, frozenset({2}))
    params = {"temperature": 0.0, "min_tokens": 3, "stop_token_ids": frozenset({17, 10**9})}
    running = sequence(1, **params)
    found = []
    for _ in range(4):
        found += tokens(sampler.sample(raw, [running]))
        running.token_ids.append(found[-1])
    assert found == [40, 40, 40, 17]


def allow(rows, vocab=V):
    bits = empty_masks(len(rows), vocab)
    for i, allowed in enumerate(rows.values()):
        for token in allowed:
            word = bits[i].numpy().view(np.uint32)
            word[token // 32] |= np.uint32(1 << (token % 32))
    return GrammarMasks(tuple(rows), bits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_s_mask_binds_its_rows_alone(temperature):
    raw = logits(4)
    batch = [sequence(i, temperature=temperature, seed=i) for i in range(4)]
    free = tokens(Sampler(V, CPU).sample(raw, batch))
    allowed = {0, 31, 32, 500, 1002} - set(free)
    masked = tokens(Sampler(V, CPU).sample(raw, batch, allow({2: allowed, 0: {1002}})))
    assert masked[0] == 1002
    assert masked[2] in allowed
    assert masked[1::2] == free[1::2]
    every = tokens(Sampler(V, CPU).sample(raw, batch, allow({i: {i + 30} for i in (2, 0, 3, 1)})))
    assert every == [30, 31, 32, 33]


def test_a_mask_of_the_wrong_width_is_refused():
    with pytest.raises(ValueError, match="masks are"):
        Sampler(V, CPU).sample(logits(1), [sequence()], GrammarMasks((0,), empty_masks(1, V + 32)))


def test_a_finished_grammar_ends_the_output_before_min_tokens():
    sampler = Sampler(V, CPU, frozenset({2, 3}))
    batch = [sequence(1, min_tokens=5), sequence(2, min_tokens=5)]
    found = tokens(sampler.sample(logits(2), batch, allow({0: {2}, 1: {3, 50}})))
    assert found == [2, 50]


def test_constraints_that_leave_nothing_fail_their_own_row():
    found = Sampler(V, CPU).sample(
        logits(2), [sequence(1), sequence(2, temperature=0.0)], allow({0: set()})
    )
    assert isinstance(found[0], RowError)
    assert isinstance(found[0].error, RequestError)
    assert isinstance(found[1], SampledToken)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 700, V - 1])
@pytest.mark.parametrize("greedy", [True, False])
def test_a_non_finite_row_names_its_adapter_and_harms_no_other(value, place, greedy):
    batch = variety(12)
    if greedy:
        batch = [sequence(i, temperature=0.0) for i in range(12)]
    good = Sampler(V, CPU).sample(logits(12), batch)
    bad_rows = {1: AdapterRef("pirate", 3, Digest("0" * 64)), 11: None, 4: None}
    raw = logits(12)
    for row, adapter in bad_rows.items():
        raw[row, place] = value
        batch[row].adapter = adapter
    found = Sampler(V, CPU).sample(raw, batch)
    for row in range(12):
        if row not in bad_rows:
            assert found[row] == good[row]
            continue
        error = found[row].error
        assert isinstance(error, EngineFailedError)
        assert "non-finite logits" in error.message
        assert ("pirate@3" if row == 1 else "base model") in error.message


def test_a_row_without_any_finite_logit_is_an_error_too():
    raw = logits(2)
    raw[0] = -torch.inf
    found = Sampler(V, CPU).sample(raw, [sequence(1), sequence(2)])
    assert isinstance(found[0].error, EngineFailedError)
    assert isinstance(found[1], SampledToken)


def test_shapes_that_do_not_fit_are_refused():
    sampler = Sampler(V, CPU)
    with pytest.raises(ValueError, match=r"logits are \[2, 1003\], not \[1, 1003\]"):
        sampler.sample(logits(2), [sequence()])
    with pytest.raises(ValueError, match="not"):
        sampler.sample(logits(1, V + 1), [sequence()])
    assert sampler.sample(logits(0), []) == []


def test_the_batch_may_change_from_step_to_step():
    # One sampler over a changing batch equals fresh samplers: plans and buffers carry nothing over.
    sampler = Sampler(V, CPU)
    everyone = variety(30)
    for step, rows in enumerate([range(30), range(5), range(3, 20), [29], range(30), [7, 3, 11]]):
        raw = logits(len(rows), seed=step)
        batch = [everyone[i] for i in rows]
        assert sampler.sample(raw, batch) == Sampler(V, CPU).sample(raw, batch)
