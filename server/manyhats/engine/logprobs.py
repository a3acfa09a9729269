"""Log-probabilities of the model's own distribution, for the rows that asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from manyhats.types import TokenLogprob

_CHUNK: Final = 64
"""Rows turned into fp32 log-probabilities at a time: bounds the temporary at 64 * V * 4 bytes."""


def token_logprobs(
    logits: Tensor, chosen: Sequence[int], tops: Sequence[int]
) -> list[TokenLogprob]:
    """fp32 ``log_softmax`` of ``logits`` [R, V] (any float dtype) at ``chosen``, with alternatives.

    Row i lists its ``tops[i]`` likeliest tokens (at most V), best first, the lower id first among
    equals, so that a greedy choice is always the first of them. A logit of -inf gives a
    log-probability of -inf.
    """
    found: list[TokenLogprob] = []
    for start in range(0, len(chosen), _CHUNK):
        part = slice(start, start + _CHUNK)
        found += _chunk_logprobs(logits[part], chosen[part], tops[part])
    return found


def _chunk_logprobs(
    logits: Tensor, chosen: Sequence[int], tops: Sequence[int]
) -> list[TokenLogprob]:
    raw = logits.float()
    logprobs = torch.log_softmax(raw, dim=-1)
    index = torch.tensor(chosen, dtype=torch.int64, device=raw.device).unsqueeze(1)
    own = logprobs.gather(1, index).squeeze(1).tolist()
    best = _alternatives(raw, logprobs, [min(k, raw.shape[1]) for k in tops])
    return [TokenLogprob(t, p, top) for t, p, top in zip(chosen, own, best, strict=True)]


def _alternatives(
    raw: Tensor, logprobs: Tensor, tops: Sequence[int]
) -> list[tuple[tuple[int, float], ...]]:
    widest = max(tops)
    if widest == 0:
        return [()] * len(tops)
    # topk leaves open which of several equal values it returns; the k-th value itself is certain.
    values = raw.topk(widest, dim=-1).values
    last = torch.tensor([max(k, 1) - 1 for k in tops], device=raw.device).unsqueeze(1)
    row, token = (raw >= values.gather(1, last)).nonzero(as_tuple=True)
    value, logprob = raw[row, token].cpu().numpy(), logprobs[row, token].cpu().numpy()
    rows, tokens = row.cpu().numpy(), token.cpu().numpy()
    order = np.lexsort((tokens, -value, rows))
    starts = np.searchsorted(rows, np.arange(len(tops)))
    found: list[tuple[tuple[int, float], ...]] = []
    for i, k in enumerate(tops):
        ids = order[starts[i] : starts[i] + k]
        found.append(tuple(zip(tokens[ids].tolist(), logprob[ids].tolist(), strict=True)))
    return found
