"""Teacher-forced scoring: what several versions of the model say of the same tokens, compared.

Each version (a lane) reads prompt and answer in one background sequence, and for each token of the
answer its whole next-token distribution is looked at. Lanes run one after the other; the logits of
the first lane's answer are kept meanwhile as the model gave them, in its dtype (so nothing is lost
to rounding), and those of a further lane meet them as they come out of a step. Both are turned into
fp32 log-probabilities a few rows at a time. So what is held between steps is answer tokens times
vocabulary in the model's dtype, which ``compare_mb`` bounds, and no fp32 copy of it.

With p the first lane's distribution before a token and q another's: entropy is -sum p log p,
divergence sum p log(p / q) over the full vocabulary (Kullback and Leibler 1951), both in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from manyhats.engine.interface import LaneScores
from manyhats.errors import EngineFailedError
from manyhats.types import AdapterRef

_CHUNK: Final = 64
_CACHED: Final = 1 << 18
"""Logits that a CPU looks at together: a dozen passes go over their megabyte of fp32, which a
core's own cache holds."""


class LaneProbe:
    """One lane's rows as the steps make them; ``scores`` once all have come.

    ``targets``: the tokens that get a score. ``first``: the lane to compare with, None for the
    first one, whose targets are the last ones of this lane; ``keep``: whether further lanes will be
    compared with this one. Called on the step thread, read once the request has ended. A lane that
    is drawn (``drawn``), not forced, begins without targets, has no mean hidden state, and is
    looked at later (``catch_up``): nothing of it waits for the device within a live step.
    """

    def __init__(
        self,
        adapter: AdapterRef | None,
        targets: Sequence[int],
        *,
        first: LaneProbe | None = None,
        keep: bool = False,
    ) -> None:
        self._adapter = adapter
        self._targets = list(targets)
        self._first = first
        self._alone = 0 if first is None else len(targets) - len(first._targets)
        self._keep = keep
        self._kept: list[torch.Tensor] = []
        self._hidden: torch.Tensor | None = None
        self._logprobs: list[float] = []
        self._top: list[int] = []
        self._confidences: list[float] = []
        self._entropies: list[float] = []
        self._divergences: list[float] = []

    def drawn(self, logits: torch.Tensor, token: int) -> None:
        """The next row, [1, V], which is copied, and the token that was drawn of it."""
        self._targets.append(token)
        self._kept.append(logits.clone())

    @torch.inference_mode()
    def catch_up(self, rows: int) -> bool:
        """Looks at the next ``rows`` of what was drawn; whether any are left. Raises as ``rows``
        does.
        """
        begin = len(self._logprobs)
        if begin < len(self._kept):
            self._look_at(torch.cat(self._kept[begin : begin + rows]))
        return len(self._logprobs) < len(self._kept)

    def rows(self, logits: torch.Tensor, hidden: torch.Tensor | None) -> None:
        """The next rows in order: ``logits`` [R, V] in the model's dtype, ``hidden`` [R, H], what
        the head was given. Raises EngineFailedError where a row has no finite maximum.
        """
        self._look_at(logits)
        if self._keep:
            self._kept.append(logits.clone())
        if hidden is not None:
            total = hidden.float().sum(0)
            self._hidden = total if self._hidden is None else self._hidden + total

    def _look_at(self, logits: torch.Tensor) -> None:
        if not bool(logits.amax(-1).isfinite().all()):
            raise EngineFailedError(
                f"the logits of {self._adapter or 'the base'} are not finite: nothing to compare"
            )
        begin = len(self._logprobs)
        some = max(1, _CACHED // logits.shape[-1]) if logits.device.type == "cpu" else _CHUNK
        for start in range(0, len(logits), some):
            self._score(logits[start : start + some], begin + start)

    def scores(self) -> LaneScores:
        """The lane's figures. Raises RuntimeError while rows are missing."""
        if len(self._logprobs) != len(self._targets):
            raise RuntimeError(f"{len(self._logprobs)} of {len(self._targets)} rows are scored")
        both = self._top[self._alone :]
        agrees = () if self._first is None else zip(self._first._top, both, strict=True)
        return LaneScores(
            adapter=self._adapter,
            logprobs=tuple(self._logprobs),
            top_ids=tuple(self._top),
            confidences=tuple(self._confidences),
            entropies=tuple(self._entropies),
            divergences=tuple(self._divergences),
            agreements=tuple(a == b for a, b in agrees),
            hidden_mean=()
            if self._hidden is None
            else tuple((self._hidden / len(self._targets)).tolist()),
        )

    def _score(self, logits: torch.Tensor, begin: int) -> None:
        shifted, top, weights = _shifted(logits)
        total = weights.sum(-1)
        logsum = total.log()
        targets = self._targets[begin : begin + len(logits)]
        index = torch.tensor(targets, dtype=torch.int64, device=logits.device)[:, None]
        self._logprobs += (shifted.gather(1, index)[:, 0] - logsum).tolist()
        self._top += top.tolist()
        self._confidences += total.reciprocal().tolist()
        self._entropies += (logsum - _expected(weights, shifted) / total).tolist()
        if self._first is not None and (ahead := max(0, self._alone - begin)) < len(logits):
            rows = slice(begin + ahead - self._alone, begin + len(logits) - self._alone)
            logq = shifted[ahead:].sub_(logsum[ahead:, None])
            self._divergences += _divergence(self._first._reference(rows), logq).tolist()

    def _reference(self, rows: slice) -> torch.Tensor:
        """fp32 log-probabilities of the kept rows."""
        pieces, offset = [], 0
        for kept in self._kept:
            pieces.append(kept[max(0, rows.start - offset) : max(0, rows.stop - offset)])
            offset += len(kept)
        shifted, _, weights = _shifted(torch.cat(pieces))
        return shifted.sub_(weights.sum(-1).log()[:, None])


def _shifted(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(fp32 logits less their row's maximum, where that is, their exponentials)."""
    shifted = logits.float()
    if shifted is logits:
        shifted = logits.clone()
    best, top = shifted.max(-1)
    shifted.sub_(best[:, None])
    return shifted, top, shifted.exp()


def _expected(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The sum over each row of weights times values; what has no weight counts nothing."""
    return values.masked_fill(weights == 0, 0).mul_(weights).sum(-1)


def _divergence(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of each row, [R], never below zero; infinite where q rules out what p allows."""
    return _expected(logp.exp(), logp - logq).clamp_min_(0.0)
