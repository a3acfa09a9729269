"""From a step's logits to its tokens, on the whole batch at once.

What is done to a row, in this order (each only where its parameter asks for it):

1. ``logit_bias`` is added (OpenAI's API reference: "added to the logits prior to sampling");
2. a grammar's forbidden tokens become -inf;
3. before ``min_tokens`` outputs, the end-of-sequence tokens and ``stop_token_ids`` become -inf
   (vLLM), unless the grammar allows nothing else: a finished grammar ends the output;
4. repetition penalty, then frequency and presence penalty (``penalties``);
5. temperature 0 takes the largest logit (the lowest id among equals); otherwise logits are divided
   by it;
6. top_k, top_p, min_p (``distribution.cutoffs``);
7. one uniform keyed by (seed, output index) picks a token by inverse CDF over what is left, in the
   order of token ids.

1 to 4 before 5 and 6 is the order of vLLM (``v1/sample/sampler.py``) and of transformers'
generation. Log-probabilities are of the raw logits, before all of this. Nothing of one row reaches
another, so a token depends on its own logits, parameters, seed and position alone, whoever shares
the batch; a row whose logits are not finite yields an error for its own sequence and harms no
other.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.distribution import block_mass, cutoffs, inverse_cdf, padded_width, row_max
from manyhats.engine.grammar_mask import GrammarMasks
from manyhats.engine.logprobs import token_logprobs
from manyhats.engine.penalties import Penalties
from manyhats.engine.randomness import uniforms
from manyhats.engine.sampling_plan import Plan, RandomRows, build_plan
from manyhats.errors import EngineFailedError, ManyhatsError, RequestError
from manyhats.types import AdapterRef, Sequence, TokenLogprob


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A row's token; ``logprob`` where its sequence asked for one."""

    token_id: int
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True)
class RowError:
    """A row that has no token; its sequence alone fails with ``error``."""

    error: ManyhatsError


class Sampler:
    """Samples one token a row. Confined to the step loop's thread (it reuses its buffers).

    ``eos_token_ids`` are the tokens that ``min_tokens`` holds back besides a sequence's own stop
    tokens.
    """

    def __init__(
        self, vocab_size: int, device: torch.device, eos_token_ids: frozenset[int] = frozenset()
    ) -> None:
        self._vocab = vocab_size
        self._device = device
        self._eos = eos_token_ids
        self._penalties = Penalties()
        self._plan: Plan | None = None
        self._buffers: dict[str, Tensor] = {}

    def forget(self, sequence_id: int) -> None:
        """Drop what is kept of a sequence (penalty counts). Unknown ids are fine."""
        self._penalties.forget(sequence_id)

    @torch.inference_mode()
    def sample(
        self,
        logits: Tensor,
        sequences: SequenceABC[Sequence],
        grammar_masks: GrammarMasks | None = None,
    ) -> list[SampledToken | RowError]:
        """One token for each row of ``logits`` [B, V] (any float dtype, not changed).

        ``sequences[i]`` owns row i, and its token will be output index ``sequences[i].output_len``.
        Raises ValueError when the shapes do not fit each other.
        """
        self._check_shape(logits, len(sequences))
        if not sequences:
            return []
        plan = self._plan_for(sequences)
        if plan.plain and grammar_masks is None:
            work = logits
        else:
            work = self._buffer("work", len(sequences), self._vocab).copy_(logits)
            self._constrain(work, plan, sequences, grammar_masks)
        top, ids = row_max(work)
        finite = top.isfinite()
        if plan.random is not None:
            ids = self._draw(work, top, ids, plan.random, sequences)
        tokens: list[int] = torch.where(finite, ids, -1).tolist()
        return self._results(logits, tokens, plan, sequences)

    @torch.inference_mode()
    def prompt_logprobs(
        self,
        logits: Tensor,
        targets: SequenceABC[int],
        k: int,
        adapter: AdapterRef | None = None,
    ) -> list[TokenLogprob]:
        """Log-probabilities of a prompt's own tokens, with ``k`` alternatives each.

        Row i of ``logits`` [P, V] is what predicts ``targets[i]``. Raises EngineFailedError, naming
        ``adapter``, when a row is not finite.
        """
        self._check_shape(logits, len(targets))
        if not targets:
            return []
        if not bool(row_max(logits)[0].isfinite().all()):
            raise _non_finite(adapter)
        return token_logprobs(logits, targets, [k] * len(targets))

    def _check_shape(self, logits: Tensor, rows: int) -> None:
        if logits.shape != (rows, self._vocab):
            raise ValueError(f"logits are {list(logits.shape)}, not [{rows}, {self._vocab}]")

    def _constrain(
        self,
        work: Tensor,
        plan: Plan,
        sequences: SequenceABC[Sequence],
        grammar_masks: GrammarMasks | None,
    ) -> None:
        """Bias, grammar, min_tokens and penalties, in place."""
        if plan.bias is not None:
            places = (plan.bias.rows, plan.bias.tokens)
            work.index_put_(places, plan.bias.values, accumulate=True)
        if grammar_masks is not None:
            grammar_masks.apply(work)
        constrained = frozenset(grammar_masks.rows) if grammar_masks is not None else frozenset()
        for row, banned in plan.min_tokens:
            if sequences[row].output_len < sequences[row].params.min_tokens:
                _ban(work[row], banned, keep_if_alone=row in constrained)
        if plan.penalized:
            self._penalties.apply(work, plan.penalized, [sequences[i] for i in plan.penalized])

    def _draw(
        self,
        work: Tensor,
        top: Tensor,
        ids: Tensor,
        random: RandomRows,
        sequences: SequenceABC[Sequence],
    ) -> Tensor:
        """``ids`` with the random rows' tokens put in; ``top`` is each row's largest logit."""
        count, width = len(random.rows), padded_width(self._vocab)
        scores = self._buffer("scores", count, width)
        picked, largest = (work, top) if random.every else (work[random.index], top[random.index])
        # Shifted first, so that no temperature takes a logit out of fp32's range.
        torch.sub(picked, largest.float().unsqueeze(1), out=scores[:, : self._vocab])
        scores[:, self._vocab :] = -torch.inf
        scores.div_(random.temperature)
        weights = torch.softmax(scores, dim=-1, out=self._buffer("weights", count, width))
        mass = block_mass(weights)
        if random.filters.any:
            cut = cutoffs(weights, mass[:, -1], random.filters)
            # As 0 and 1 in fp32: torch's masked_fill and where take many times longer on CPUs.
            weights.mul_(scores.copy_(weights).ge_(cut.unsqueeze(1)))
            mass = block_mass(weights)
        positions = np.array([sequences[i].output_len for i in random.rows], dtype=np.uint64)
        u = torch.from_numpy(uniforms(random.starts, positions)).to(self._device)
        tokens = inverse_cdf(weights, mass, u)
        return tokens if random.every else ids.index_copy(0, random.index, tokens)

    def _results(
        self,
        logits: Tensor,
        tokens: list[int],
        plan: Plan,
        sequences: SequenceABC[Sequence],
    ) -> list[SampledToken | RowError]:
        """Tokens (-1: none could be chosen) as results, with the logprobs asked for."""
        out: list[SampledToken | RowError] = [SampledToken(token, None) for token in tokens]
        if min(tokens) < 0:
            for row in (i for i, token in enumerate(tokens) if token < 0):
                out[row] = RowError(_row_failure(logits[row], sequences[row]))
        for row, error in plan.errors.items():
            out[row] = RowError(error)
        rows = [row for row in plan.logprob_rows if isinstance(out[row], SampledToken)]
        if rows:
            chosen = [tokens[row] for row in rows]
            tops = [sequences[row].params.logprobs or 0 for row in rows]
            own = logits if len(rows) == len(logits) else logits[rows]
            found = token_logprobs(own, chosen, tops)
            for row, logprob in zip(rows, found, strict=True):
                out[row] = SampledToken(logprob.token_id, logprob)
        return out

    def _plan_for(self, sequences: SequenceABC[Sequence]) -> Plan:
        params = [sequence.params for sequence in sequences]
        if self._plan is None or self._plan.params != params:
            self._plan = build_plan(params, self._vocab, self._eos, self._device)
        return self._plan

    def _buffer(self, name: str, rows: int, columns: int) -> Tensor:
        """An fp32 [rows, columns] with any content, kept between steps: fresh pages cost more."""
        held = self._buffers.get(name)
        if held is None or held.shape[0] < rows:
            held = torch.empty(rows, columns, dtype=torch.float32, device=self._device)
            self._buffers[name] = held
        return held[:rows]


def _ban(row: Tensor, banned: Tensor, *, keep_if_alone: bool) -> None:
    """Set ``row[banned]`` (row: [V]) to -inf; ``keep_if_alone``: not where nothing else is left."""
    before = row[banned]
    row[banned] = -torch.inf
    if keep_if_alone and bool(torch.isneginf(row).all()):
        row[banned] = before


def _non_finite(adapter: AdapterRef | None) -> EngineFailedError:
    who = "the base model" if adapter is None else f"adapter {adapter}"
    return EngineFailedError(f"{who} produced non-finite logits")


def _row_failure(raw: Tensor, sequence: Sequence) -> ManyhatsError:
    """Why one row [V] has no token: its own logits, or constraints that leave nothing."""
    if bool(row_max(raw.unsqueeze(0))[0].isfinite()):
        return RequestError(
            "no token is left to choose: response_format and min_tokens exclude every one",
            param="min_tokens",
        )
    return _non_finite(sequence.adapter)
