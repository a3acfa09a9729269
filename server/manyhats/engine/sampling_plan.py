"""The sampling parameters of one batch composition, as tensors.

Built when the composition changes and reused while the same sequences stay in the batch: a
sequence's parameters never change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyhats.engine.distribution import Filters
from manyhats.engine.penalties import wants_penalties
from manyhats.engine.randomness import stream_starts
from manyhats.errors import ManyhatsError, RequestError
from manyhats.types import SamplingParams

GREEDY_BELOW: Final = 1e-5
"""Temperatures under this are greedy, as in vLLM (``_SAMPLING_EPS``)."""


def is_greedy(params: SamplingParams) -> bool:
    """Whether nothing is drawn: temperature 0, or top_k 1 (a draw would only split ties)."""
    return params.temperature < GREEDY_BELOW or params.top_k == 1


@dataclass(frozen=True, slots=True)
class RandomRows:
    """The S rows that are drawn at random. ``every``: they are the whole batch.

    ``rows`` and ``index`` ([S] int64) are their places in the batch; ``starts`` [S] uint64 their
    random streams; ``temperature`` [S, 1] fp32.
    """

    rows: list[int]
    index: Tensor
    starts: NDArray[np.uint64]
    temperature: Tensor
    filters: Filters
    every: bool


@dataclass(frozen=True, slots=True)
class LogitBias:
    """``values[i]`` (fp32) is added to token ``tokens[i]`` of row ``rows[i]`` (int64), each [N]."""

    rows: Tensor
    tokens: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """What the sampler does for one list of parameters, row by row.

    ``min_tokens``: rows with a minimum, and the token ids that are held back until then.
    ``errors``: rows whose parameters do not fit the model. ``plain``: no row's logits are changed.
    """

    params: list[SamplingParams]
    bias: LogitBias | None
    min_tokens: list[tuple[int, Tensor]]
    penalized: list[int]
    random: RandomRows | None
    logprob_rows: list[int]
    errors: dict[int, ManyhatsError]
    plain: bool


def build_plan(
    params: list[SamplingParams], vocab: int, eos: frozenset[int], device: torch.device
) -> Plan:
    """The plan of rows with ``params`` over ``vocab`` tokens, its tensors on ``device``."""
    bias, errors = _bias(params, vocab, device)
    min_tokens = [
        (row, _ints(sorted(t for t in eos | p.stop_token_ids if 0 <= t < vocab), device))
        for row, p in enumerate(params)
        if p.min_tokens > 0
    ]
    penalized = [row for row, p in enumerate(params) if wants_penalties(p)]
    return Plan(
        params=params,
        bias=bias,
        min_tokens=min_tokens,
        penalized=penalized,
        random=_random_rows(params, device),
        logprob_rows=[row for row, p in enumerate(params) if p.logprobs is not None],
        errors=errors,
        plain=bias is None and not min_tokens and not penalized,
    )


def _bias(
    params: list[SamplingParams], vocab: int, device: torch.device
) -> tuple[LogitBias | None, dict[int, ManyhatsError]]:
    """All rows' biases, and the rows that name a token which does not exist."""
    errors: dict[int, ManyhatsError] = {}
    entries: list[tuple[int, int, float]] = []
    for row, p in enumerate(params):
        bad = next((token for token, _ in p.logit_bias if not 0 <= token < vocab), None)
        if bad is None:
            entries += [(row, token, value) for token, value in p.logit_bias]
        else:
            message = f"logit_bias names token {bad}; token ids are 0 to {vocab - 1}"
            errors[row] = RequestError(message, param="logit_bias")
    if not entries:
        return None, errors
    rows, tokens, values = zip(*entries, strict=True)
    added = torch.tensor(values, dtype=torch.float32, device=device)
    return LogitBias(_ints(list(rows), device), _ints(list(tokens), device), added), errors


def _random_rows(params: list[SamplingParams], device: torch.device) -> RandomRows | None:
    rows = [row for row, p in enumerate(params) if not is_greedy(p)]
    if not rows:
        return None
    own = [params[row] for row in rows]
    temperature = torch.tensor([p.temperature for p in own], dtype=torch.float32, device=device)
    return RandomRows(
        rows=rows,
        index=_ints(rows, device),
        starts=stream_starts([p.seed for p in own]),
        temperature=temperature.unsqueeze(1),
        filters=Filters.build(
            [max(p.top_k, 0) for p in own], [p.top_p for p in own], [p.min_p for p in own], device
        ),
        every=len(rows) == len(params),
    )


def _ints(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
