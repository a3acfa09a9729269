"""Teacher-forced scoring: what several versions of the model say of the same tokens, compared.

Each version (a lane) reads prompt and answer in one background sequence, and for each token of the
answer its whole next-token distribution is looked at. Lanes run one after the other; the logits of
the first lane's answer are kept meanwhile as the model gave them, in its dtype (so nothing is lost
to rounding), and those of a further lane meet them as they come out of a step. Both are turned into
fp32 log-probabilities ``_CHUNK`` rows at a time. So what is held between steps is answer tokens
times vocabulary in the model's dtype, which ``compare_mb`` bounds, and no fp32 copy of it.

With p the first lane's distribution before a token and q another's: entropy is -sum p log p,
divergence sum p log(p / q) over the full vocabulary (Kullback and Leibler 1951), both in nats.
"""

from __future__ import annotations

from typing import Final

import torch

from manyhats.engine.interface import LaneScores
from manyhats.errors import EngineFailedError
from manyhats.types import AdapterRef

_CHUNK: Final = 64


class LaneProbe:
    """One lane's rows as the steps make them; ``scores`` once all have come.

    ``targets``: the answer's tokens. ``first``: the lane to compare with, None for the first one;
    ``keep``: whether further lanes will be compared with this one. Called on the step thread, read
    once the request has ended.
    """

    def __init__(
        self,
        adapter: AdapterRef | None,
        targets: tuple[int, ...],
        *,
        first: LaneProbe | None = None,
        keep: bool = False,
    ) -> None:
        self._adapter = adapter
        self._targets = targets
        self._first = first
        self._keep = keep
        self._kept: list[torch.Tensor] = []
        self._hidden: torch.Tensor | None = None
        self._logprobs: list[float] = []
        self._top: list[int] = []
        self._confidences: list[float] = []
        self._entropies: list[float] = []
        self._divergences: list[float] = []

    def rows(self, logits: torch.Tensor, hidden: torch.Tensor | None) -> None:
        """The next rows in order: ``logits`` [R, V] in the model's dtype, ``hidden`` [R, H], what
        the head was given. Raises EngineFailedError where a row has no finite maximum.
        """
        if not bool(logits.amax(-1).isfinite().all()):
            raise EngineFailedError(
                f"the logits of {self._adapter or 'the base'} are not finite: nothing to compare"
            )
        if self._keep:
            self._kept.append(logits.clone())
        if hidden is not None:
            total = hidden.float().sum(0)
            self._hidden = total if self._hidden is None else self._hidden + total
        begin = len(self._logprobs)
        for start in range(0, len(logits), _CHUNK):
            chunk = logits[start : start + _CHUNK]
            self._score(chunk, begin + start)

    def scores(self) -> LaneScores:
        """The lane's figures. Raises RuntimeError while rows are missing."""
        if len(self._logprobs) != len(self._targets) or self._hidden is None:
            raise RuntimeError(f"{len(self._logprobs)} of {len(self._targets)} rows are scored")
        agrees = () if self._first is None else zip(self._first._top, self._top, strict=True)
        return LaneScores(
            adapter=self._adapter,
            logprobs=tuple(self._logprobs),
            top_ids=tuple(self._top),
            confidences=tuple(self._confidences),
            entropies=tuple(self._entropies),
            divergences=tuple(self._divergences),
            agreements=tuple(a == b for a, b in agrees),
            hidden_mean=tuple((self._hidden / len(self._targets)).tolist()),
        )

    def _score(self, logits: torch.Tensor, begin: int) -> None:
        logp = torch.log_softmax(logits.float(), -1)
        p = logp.exp()
        targets = self._targets[begin : begin + len(logits)]
        index = torch.tensor(targets, dtype=torch.int64, device=logits.device)[:, None]
        self._logprobs += logp.gather(1, index)[:, 0].tolist()
        confidence, top = p.max(-1)
        self._confidences += confidence.tolist()
        self._top += top.tolist()
        self._entropies += torch.special.entr(p).sum(-1).tolist()
        if self._first is not None:
            self._divergences += _divergence(
                self._first._reference(begin, begin + len(logits)), logp
            ).tolist()

    def _reference(self, begin: int, end: int) -> torch.Tensor:
        """fp32 log-probabilities of the kept rows begin:end."""
        pieces, offset = [], 0
        for kept in self._kept:
            pieces.append(kept[max(0, begin - offset) : max(0, end - offset)])
            offset += len(kept)
        return torch.log_softmax(torch.cat(pieces).float(), -1)


def _divergence(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of each row, [R], never below zero; infinite where q rules out what p allows."""
    p = logp.exp()
    terms = torch.where(p > 0, p * (logp - logq), torch.zeros_like(p))
    return terms.sum(-1).clamp_min(0.0)
