"""Log-probabilities against torch.log_softmax."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhats.engine.logprobs import token_logprobs
from manyhats.engine.sampling import Sampler
from manyhats.errors import EngineFailedError
from manyhats.types import AdapterRef, Digest, SamplingParams, Sequence, TenantId

CPU = torch.device("cpu")


def normal(rows, vocab, seed=0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 4


def sequence(id_, **params):
    return Sequence(
        id=id_, request_id="r", index=0, tenant=TenantId("t"), prompt_len=1, token_ids=[1],
        params=SamplingParams(**{"max_tokens": 9, "seed": id_, **params}), adapter=None,
        arrival=0.0,
    )  # fmt: skip


@settings(max_examples=30)
@given(
    st.sampled_from([5, 301]),
    st.lists(st.integers(0, 20), min_size=1, max_size=150),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_values_order_and_number(vocab, tops, dtype):
    raw = normal(len(tops), vocab).to(dtype)
    chosen = [(7 * i) % vocab for i in range(len(tops))]
    expected = torch.log_softmax(raw.double(), -1)
    found = token_logprobs(raw, chosen, tops)
    assert [f.token_id for f in found] == chosen
    for i, (entry, k) in enumerate(zip(found, tops, strict=True)):
        assert entry.logprob == pytest.approx(float(expected[i, chosen[i]]), abs=2e-5)
        order = sorted(range(vocab), key=lambda t: (-float(raw[i, t]), t))[: min(k, vocab)]
        assert [t for t, _ in entry.top] == order
        assert [p for _, p in entry.top] == pytest.approx(
            [float(expected[i, t]) for t in order], abs=2e-5
        )


def test_they_are_of_the_raw_distribution_and_come_only_where_asked():
    raw = normal(4, 301)
    batch = [
        sequence(0, logprobs=2, temperature=0.0, logit_bias=((300, 100.0),)),
        sequence(1),
        sequence(2, logprobs=0, temperature=2.0, top_k=3, repetition_penalty=1.5),
        sequence(3, logprobs=5, temperature=0.0),
    ]
    found = Sampler(301, CPU).sample(raw, batch)
    expected = torch.log_softmax(raw, -1)
    assert found[1].logprob is None
    assert found[0].token_id == 300
    for row, count in ((0, 2), (2, 0), (3, 5)):
        entry = found[row].logprob
        assert entry.token_id == found[row].token_id
        assert entry.logprob == float(expected[row, entry.token_id])
        assert len(entry.top) == count
    assert found[3].logprob.top[0] == (found[3].token_id, found[3].logprob.logprob)


def test_a_row_that_fails_has_none_and_the_others_do():
    raw = normal(3, 301)
    raw[1, 5] = float("nan")
    found = Sampler(301, CPU).sample(raw, [sequence(i, logprobs=1) for i in range(3)])
    assert isinstance(found[1].error, EngineFailedError)
    assert found[0].logprob.logprob < 0
    assert found[2].logprob.logprob < 0


def test_prompt_logprobs():
    raw = normal(130, 301).bfloat16()
    targets = [(11 * i) % 301 for i in range(130)]
    found = Sampler(301, CPU).prompt_logprobs(raw, targets, 3)
    expected = torch.log_softmax(raw.float(), -1)
    assert [f.token_id for f in found] == targets
    assert [f.logprob for f in found] == [float(expected[i, t]) for i, t in enumerate(targets)]
    assert all(len(f.top) == 3 for f in found)
    assert Sampler(301, CPU).prompt_logprobs(raw[:0], [], 3) == []


def test_prompt_logprobs_of_a_broken_adapter_name_it():
    raw = normal(4, 301)
    raw[2, 0] = float("nan")
    with pytest.raises(EngineFailedError, match="adapter pirate@2 produced non-finite logits"):
        Sampler(301, CPU).prompt_logprobs(
            raw, [1, 2, 3, 4], 0, AdapterRef("pirate", 2, Digest("0" * 64))
        )
    with pytest.raises(ValueError, match="logits are"):
        Sampler(301, CPU).prompt_logprobs(raw, [1, 2], 0)
