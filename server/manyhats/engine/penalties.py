"""Repetition, frequency and presence penalties, kept up to date as tokens are appended.

What a penalty needs of a sequence is which tokens it holds and how often; that is kept as a sparse
list of distinct tokens, so a step costs the tokens that were seen rather than the vocabulary, and a
sequence that asks for no penalty keeps nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyhats.types import SamplingParams, Sequence


def wants_penalties(params: SamplingParams) -> bool:
    """Whether any of the three penalties changes a logit."""
    return (
        params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
    )


class _Seen:
    """One sequence's distinct tokens and how often each was *generated* (0: only in the prompt)."""

    def __init__(self, sequence: Sequence) -> None:
        # Frequency and presence look at the output alone; only repetition needs the prompt.
        prompt: list[int] = []
        if sequence.params.repetition_penalty != 1.0:
            prompt = list(
                dict.fromkeys(sequence.token_ids[sequence.virtual_tokens : sequence.prompt_len])
            )
        self._place = {token: i for i, token in enumerate(prompt)}
        self._tokens = np.array(prompt, dtype=np.int64)
        self._counts = np.zeros(len(prompt), dtype=np.float32)
        self.consumed = sequence.prompt_len

    def advance(self, sequence: Sequence) -> None:
        """Count the tokens appended since the last call."""
        for token in sequence.token_ids[self.consumed :]:
            place = self._place.setdefault(token, len(self._place))
            if place >= len(self._tokens):
                grown = max(16, 2 * len(self._tokens))
                self._tokens = np.resize(self._tokens, grown)
                self._counts = np.concatenate(
                    [self._counts, np.zeros(grown - len(self._counts), np.float32)]
                )
            self._tokens[place] = token
            self._counts[place] += 1.0
        self.consumed = len(sequence.token_ids)

    def tokens(self) -> NDArray[np.int64]:
        """Distinct token ids, [D]."""
        return self._tokens[: len(self._place)]

    def counts(self) -> NDArray[np.float32]:
        """How often each was generated, [D]."""
        return self._counts[: len(self._place)]


class Penalties:
    """The penalty state of all sequences that want one. Confined to the step loop's thread."""

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def forget(self, sequence_id: int) -> None:
        """Drop a finished sequence's counts; unknown ids are fine (most keep none)."""
        self._seen.pop(sequence_id, None)

    def apply(
        self, logits: Tensor, rows: SequenceABC[int], sequences: SequenceABC[Sequence]
    ) -> None:
        """Penalize ``logits`` [B, V] (fp32) in place; ``sequences[i]`` owns row ``rows[i]``.

        For a token j that occurs c_j times in the output:

        - repetition r (HF's ``RepetitionPenaltyLogitsProcessor``, after Keskar et al. 2019), for
          tokens of prompt and output, once: ``l_j * r if l_j < 0 else l_j / r``;
        - then frequency f and presence p (OpenAI's API reference), for tokens of the output:
          ``l_j - c_j * f - (c_j > 0) * p``.
        """
        seen = [self._current(sequence) for sequence in sequences]
        sizes = [len(state.tokens()) for state in seen]
        if not sum(sizes):
            return
        params = [sequence.params for sequence in sequences]
        device = logits.device

        def spread(values: list[float]) -> Tensor:
            return torch.from_numpy(np.repeat(np.array(values, np.float32), sizes)).to(device)

        row = torch.from_numpy(np.repeat(np.array(rows, np.int64), sizes)).to(device)
        token = torch.from_numpy(np.concatenate([state.tokens() for state in seen])).to(device)
        count = torch.from_numpy(np.concatenate([state.counts() for state in seen])).to(device)
        repetition = spread([p.repetition_penalty for p in params])
        value = logits[row, token]
        value = torch.where(value < 0, value * repetition, value / repetition)
        value -= count * spread([p.frequency_penalty for p in params])
        value -= (count > 0) * spread([p.presence_penalty for p in params])
        logits[row, token] = value

    def _current(self, sequence: Sequence) -> _Seen:
        state = self._seen.get(sequence.id)
        if state is None or state.consumed > len(sequence.token_ids):
            state = self._seen[sequence.id] = _Seen(sequence)
        state.advance(sequence)
        return state
