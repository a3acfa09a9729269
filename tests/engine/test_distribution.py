"""Filters and the draw against transformers' own warpers and an exact inverse CDF."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from manyhats.engine.distribution import (
    Filters,
    block_mass,
    cutoffs,
    inverse_cdf,
    padded_width,
    row_max,
    top_values,
)

CPU = torch.device("cpu")


def normal(rows, vocab, seed=0, scale=3.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def padded(weights):
    rows, vocab = weights.shape
    out = torch.zeros(rows, padded_width(vocab))
    out[:, :vocab] = weights
    return out


def kept(logits, temperature, top_k, top_p, min_p):
    """Which columns stay, by the code under test; parameters are lists, one a row."""
    weights = padded((logits / torch.tensor(temperature).unsqueeze(1)).softmax(-1))
    cut = cutoffs(weights, block_mass(weights)[:, -1], Filters.build(top_k, top_p, min_p, CPU))
    return (weights >= cut.unsqueeze(1))[:, : logits.shape[1]]


def warped(logits, temperature, top_k, top_p, min_p):
    """One row through transformers' warpers, in its order."""
    scores = TemperatureLogitsWarper(temperature)(None, logits.unsqueeze(0))
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1.0:
        scores = TopPLogitsWarper(max(top_p, 0.0))(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return scores[0] > -torch.inf


def assert_same_set(found, logits, temperature, top_k, top_p, min_p):
    """As transformers' own; sums in another order may move a nucleus' last token, no other."""
    expected = warped(logits, temperature, top_k, top_p, min_p)
    difference = int((found ^ expected).sum())
    if not difference:
        return
    assert difference == 1, (int(found.sum()), int(expected.sum()))
    p = (logits.double() / temperature).softmax(0)
    if top_k:
        p = torch.where(p >= p.topk(min(top_k, len(p))).values[-1], p, 0.0)
    edges = p.sort(descending=True).values.cumsum(0) / p.sum()
    assert float((edges - top_p).abs().min()) < 1e-5


parameters = st.tuples(
    st.sampled_from([0.3, 0.7, 1.0, 1.7, 4.0]),
    st.sampled_from([0, 2, 5, 40, 63, 64, 65, 300, 10**6]),
    st.sampled_from([0.0, 1e-9, 0.1, 0.5, 0.9, 0.97, 0.999, 1.0]),
    st.sampled_from([0.0, 0.001, 0.05, 0.5, 1.0]),
)


@settings(max_examples=60)
@given(
    st.sampled_from([5, 64, 65, 257, 1003, 9001]),
    st.lists(parameters, min_size=1, max_size=8),
    st.integers(0, 99),
)
def test_what_is_kept_is_what_transformers_keeps(vocab, rows, seed):
    logits = normal(len(rows), vocab, seed)
    found = kept(logits, *map(list, zip(*rows, strict=True)))
    for i, row in enumerate(rows):
        assert_same_set(found[i], logits[i], *row)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("top_k", [0, 5, 64, 300])
@pytest.mark.parametrize("top_p", [0.5, 0.97, 0.999, 1.0])
def test_one_row_alone_keeps_the_same(temperature, top_k, top_p):
    # Alone, whether the search window suffices is this row's own matter; hot rows need the whole.
    logits = normal(1, 9001, seed=5)
    found = kept(logits, [temperature], [top_k], [top_p], [0.0])[0]
    assert_same_set(found, logits[0], temperature, top_k, top_p, 0.0)


def test_probabilities_after_filtering_are_transformers_own():
    logits = normal(1, 5000)[0]
    temperature, top_k, top_p, min_p = 0.8, 50, 0.9, 0.02
    keep = kept(logits[None], [temperature], [top_k], [top_p], [min_p])[0]
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    for warper in (TopKLogitsWarper(top_k), TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)):
        scores = warper(None, scores)
    weights = (logits / temperature).exp() * keep
    torch.testing.assert_close(weights / weights.sum(), scores[0].softmax(0))
    assert 1 < keep.sum() < 50


def test_ties_stay_or_go_together():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, 2.0, 2.0, 0.0, -torch.inf]]).repeat(4, 1)
    found = kept(logits, [1.0] * 4, [4, 0, 1, 0], [1.0, 1e-9, 1.0, 0.9999999], [0.0] * 4)
    assert found[0].nonzero().flatten().tolist() == [1, 2, 3, 4, 5]
    assert found[1].nonzero().flatten().tolist() == [1, 2]
    assert found[2].nonzero().flatten().tolist() == [1, 2]
    assert found[3, :7].all()
    assert not found[0, 7]


def test_more_ties_than_the_search_window_holds():
    # The k-th value and its ties fill more than the first window: the whole row must be looked at.
    logits = torch.zeros(3, 2000)
    logits[:, 7] = 1.0
    found = kept(logits, [1.0] * 3, [5, 0, 64], [1.0, 0.5, 0.3], [0.0] * 3)
    assert found.all()
    # The mass that top_p is a share of is theirs too: 5 % of it reaches into the ties.
    logits[:, 8] = 0.5
    assert kept(logits[:1], [1.0], [3], [0.05], [0.0]).all()


@pytest.mark.parametrize("width", [256, 4096, 4352, 9216])
@pytest.mark.parametrize("k", [1, 20, 64, 65, 200])
def test_top_values_are_the_largest_in_order(width, k):
    values = normal(3, width)
    values[1] = values[1].bfloat16().float()  # many ties
    values[2, : width // 2] = 0.0
    assert torch.equal(top_values(values, k), values.sort(descending=True).values[:, :k])


@pytest.mark.parametrize("vocab", [1, 255, 512, 513, 9001])
def test_row_max_is_argmax_and_shows_nan(vocab):
    for dtype in (torch.float32, torch.bfloat16):
        values = normal(20, vocab).to(dtype)
        best, column = row_max(values)
        assert torch.equal(best, values.amax(-1))
        assert column.tolist() == [np.flatnonzero(r == r.max())[0] for r in values.float().numpy()]
        for place in {0, vocab // 2, vocab - 1}:
            broken = values.clone()
            broken[:, place] = float("nan")
            assert row_max(broken)[0].isnan().all()


@given(st.integers(1, 1200), st.integers(0, 50), st.floats(0, 1, exclude_max=True))
def test_the_draw_inverts_the_cumulative_distribution(vocab, seed, u):
    rng = np.random.default_rng(seed)
    weights = np.where(rng.random((2, vocab)) < 0.3, 0.0, rng.random((2, vocab))).astype(np.float32)
    weights[:, rng.integers(vocab)] = 1.0
    full = padded(torch.from_numpy(weights))
    us = np.array([u, 1 - 2**-53])
    found = inverse_cdf(full, block_mass(full), torch.from_numpy(us)).tolist()
    for row, column in enumerate(found):
        assert weights[row, column] > 0
        running = weights[row].astype(np.float64).cumsum()
        before = running[column - 1] if column else 0.0
        slack = 1e-6 * running[-1]
        assert before - slack <= us[row] * running[-1] <= running[column] + slack


def test_every_column_gets_its_share_of_the_unit_interval():
    # Exact, not statistical: a grid of uniforms counts each column in proportion to its weight.
    vocab, grid = 700, 70_000
    weights = torch.zeros(1, vocab)
    weights[0, [0, 3, 255, 256, 511, 699]] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    full = padded(weights)
    us = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    found = inverse_cdf(full.expand(grid, -1), block_mass(full).expand(grid, -1).contiguous(), us)
    counts = torch.bincount(found, minlength=vocab)
    expected = weights[0] / weights.sum() * grid
    assert (counts - expected).abs().max() <= 1
