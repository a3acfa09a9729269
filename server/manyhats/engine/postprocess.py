"""From a step's logits to what its requests are told: sampling, stopping, text, bookkeeping."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import tokenizers
import torch

from manyhats.engine.detokenize import Detokenizer
from manyhats.engine.ensembles import united, wholes
from manyhats.engine.grammar import GrammarMatcher
from manyhats.engine.grammars import Grammars
from manyhats.engine.interface import EngineObserver
from manyhats.engine.kept import KeptAnswer, RowBudget
from manyhats.engine.runner import PromptRows, StepLogits
from manyhats.engine.sampling import RowError, SampledToken, Sampler
from manyhats.errors import ManyhatsError
from manyhats.scheduler.scheduler import Scheduler
from manyhats.types import (
    FinishReason,
    OutputDelta,
    Schedule,
    ScheduledSequence,
    TokenLogprob,
)
from manyhats.types import Sequence as LiveSequence


class RowProbe(Protocol):
    """Looks at the rows of a request's prompt in place of scoring them."""

    def rows(self, logits: torch.Tensor, hidden: torch.Tensor | None) -> None:
        """The next rows in order: [R, V], and what the head made them of, [R, H], where the request
        is a background one.

        May raise ManyhatsError, which ends the request.
        """


@dataclass(slots=True, eq=False)
class _Live:
    """What is kept of a sequence beside the scheduler's own state. It survives preemption."""

    sequence: LiveSequence
    detokenizer: Detokenizer
    matcher: GrammarMatcher | None
    probe: RowProbe | None = None
    kept: KeptAnswer | None = None
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    scored: int = 0  # prompt tokens, from the first that is to be scored on


class Postprocessor:
    """Ends a step. Confined to the step thread.

    ``eos_token_ids`` end a sequence unless it ignores them; ``context_len`` is the most tokens one
    may have; ``kept_rows`` of logits are kept of answers that will be compared.
    """

    def __init__(
        self,
        *,
        sampler: Sampler,
        tokenizer: tokenizers.Tokenizer,
        grammars: Grammars,
        scheduler: Scheduler,
        observer: EngineObserver,
        eos_token_ids: frozenset[int],
        context_len: int,
        kept_rows: int,
    ) -> None:
        self._sampler = sampler
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._scheduler = scheduler
        self._observer = observer
        self._eos = eos_token_ids
        self._context_len = context_len
        self._budget = RowBudget(kept_rows)
        self._live: dict[int, _Live] = {}

    def open(self, sequences: Iterable[LiveSequence], probe: RowProbe | None = None) -> None:
        """Prepares for new sequences. Raises RequestError for a grammar that cannot be had.

        ``probe`` takes the rows of the one sequence's prompt.
        """
        for sequence in sequences:
            params = sequence.params
            grammar = self._grammars.compile(params.grammar) if params.grammar is not None else None
            self._live[sequence.id] = _Live(
                sequence,
                Detokenizer(self._tokenizer, params.stop),
                grammar.matcher() if grammar is not None else None,
                probe,
                # An ensemble's row is none of the model's own.
                KeptAnswer(sequence.adapter, self._budget)
                if sequence.keeps_logits and not sequence.lanes
                else None,
            )

    def close(self, sequences: Iterable[LiveSequence]) -> None:
        """Forgets sequences that have ended, in whatever way; unknown ones are fine."""
        for sequence in sequences:
            self._live.pop(sequence.id, None)
            self._sampler.forget(sequence.id)

    def open_requests(self) -> list[str]:
        """Ids of the requests that have not ended."""
        return list(dict.fromkeys(live.sequence.request_id for live in self._live.values()))

    def process(self, schedule: Schedule, logits: StepLogits) -> list[OutputDelta]:
        """Samples, tells the scheduler what came of each item, and makes the deltas of the step."""
        errors: dict[str, ManyhatsError] = {}
        for rows in logits.prompts:
            self._score_prompt(rows, errors)
        drawn = self._sample(logits, errors)
        now = time.monotonic()
        deltas = []
        for ident, items in wholes(schedule.items).items():
            if items[0].sequence.request_id in errors:
                continue
            delta = self._advance(items, drawn.get(ident), now)
            if delta is not None:
                deltas.append(delta)
        for request_id, error in errors.items():
            self.close(self._scheduler.abort(request_id))
            deltas.append(OutputDelta(request_id, 0, error=error))
        return deltas

    def _score_prompt(self, rows: PromptRows, errors: dict[str, ManyhatsError]) -> None:
        """Scores prompt tokens; those done before a preemption are passed over."""
        sequence = rows.item.sequence
        live = self._live[sequence.id]
        begin = sequence.virtual_tokens + sequence.scores_from - 1
        done = live.scored - (rows.first - begin)
        if done >= len(rows.logits):
            return
        live.scored += len(rows.logits) - done
        targets = sequence.token_ids[rows.first + done + 1 : rows.first + len(rows.logits) + 1]
        try:
            if live.probe is not None:
                hidden = rows.hidden[done:] if rows.hidden is not None else None
                live.probe.rows(rows.logits[done:], hidden)
                return
            live.prompt_logprobs += self._sampler.prompt_logprobs(
                rows.logits[done:], targets, sequence.params.prompt_logprobs or 0, sequence.adapter
            )
        except ManyhatsError as error:
            errors[sequence.request_id] = error

    def _sample(
        self, logits: StepLogits, errors: dict[str, ManyhatsError]
    ) -> dict[int, SampledToken]:
        """The token of each sequence that drew one, by sequence id; failures go to ``errors``."""
        rows, sequences = united(logits.sampling, logits.sampled)
        matchers = {
            row: matcher
            for row, sequence in enumerate(sequences)
            if (matcher := self._live[sequence.id].matcher) is not None
        }
        masks, failed = self._grammars.masks(matchers)
        drawn: dict[int, SampledToken] = {}
        for row, result in enumerate(self._sampler.sample(rows, sequences, masks)):
            sequence = sequences[row]
            error = failed.get(row) or (result.error if isinstance(result, RowError) else None)
            if error is not None:
                errors[sequence.request_id] = error
            elif isinstance(result, SampledToken):
                drawn[sequence.id] = result
                if (kept := self._live[sequence.id].kept) is not None:
                    kept.drawn(rows[row : row + 1], result.token_id)
        return drawn

    def _advance(
        self, items: Sequence[ScheduledSequence], drawn: SampledToken | None, now: float
    ) -> OutputDelta | None:
        """``items``: those of one choice, more than one where it is an ensemble's."""
        sequence = items[0].sequence.whole or items[0].sequence
        live = self._live[sequence.id]
        if drawn is None:
            self._scheduler.complete_lanes(items, None, finished=False)
            return None
        if sequence.params.max_tokens == 0:
            return self._finish_scoring(items, live, now)
        token = drawn.token_id
        if live.matcher is not None:
            live.matcher.accept(token)
        text, reason = self._judge(sequence, live, token)
        self._scheduler.complete_lanes(items, token, finished=reason is not None)
        first = sequence.first_token_at is None
        self._clock(sequence, now)
        delta = OutputDelta(
            sequence.request_id,
            sequence.index,
            text=text,
            token_ids=(token,),
            logprobs=(drawn.logprob,) if drawn.logprob is not None else (),
            prompt_logprobs=self._prompt_scores(live) if first else None,
            finish_reason=reason,
            cached_tokens=sequence.cached_prompt_tokens,
            admitted_at=sequence.admitted_at if first else None,
            kept=live.kept if reason is not None else None,
        )
        if reason is not None:
            self._finish(sequence, reason, now)
        return delta

    def _judge(
        self, sequence: LiveSequence, live: _Live, token: int
    ) -> tuple[str, FinishReason | None]:
        """The text that the token lets out, and whether the sequence ends with it."""
        params = sequence.params
        if token in params.stop_token_ids or (token in self._eos and not params.ignore_eos):
            return live.detokenizer.flush(), FinishReason.STOP
        piece = live.detokenizer.push(token)
        if piece.stopped:
            return piece.text, FinishReason.STOP
        if (
            sequence.output_len + 1 >= params.max_tokens
            or max(len(s.token_ids) for s in sequence.computed) + 1 >= self._context_len
        ):
            return piece.text + live.detokenizer.flush(), FinishReason.LENGTH
        return piece.text, None

    def _finish_scoring(
        self, items: Sequence[ScheduledSequence], live: _Live, now: float
    ) -> OutputDelta:
        """A request for no token at all: only its prompt's scores were wanted."""
        sequence = live.sequence
        self._scheduler.complete_lanes(items, None, finished=True)
        self._finish(sequence, FinishReason.LENGTH, now)
        return OutputDelta(
            sequence.request_id,
            sequence.index,
            prompt_logprobs=self._prompt_scores(live),
            finish_reason=FinishReason.LENGTH,
            cached_tokens=sequence.cached_prompt_tokens,
        )

    def _finish(self, sequence: LiveSequence, reason: FinishReason, now: float) -> None:
        self.close((sequence,))
        if sequence.background:
            return  # the figures are of live requests
        self._observer.finished(
            adapter_name(sequence),
            reason,
            sequence.prompt_len - sequence.virtual_tokens,
            sequence.cached_prompt_tokens,
            sequence.output_len,
            now - sequence.arrival,
            sequence.request_id,
        )

    def _clock(self, sequence: LiveSequence, now: float) -> None:
        name = adapter_name(sequence)
        if sequence.background:
            sequence.first_token_at = sequence.first_token_at or now
        elif sequence.last_token_at is None:
            sequence.first_token_at = now
            self._observer.first_token(name, now - sequence.arrival, sequence.request_id)
        else:
            self._observer.inter_token(name, now - sequence.last_token_at)
        sequence.last_token_at = now

    @staticmethod
    def _prompt_scores(live: _Live) -> tuple[TokenLogprob | None, ...] | None:
        return tuple(live.prompt_logprobs) if live.sequence.wants_prompt_logprobs else None


def adapter_name(sequence: LiveSequence) -> str | None:
    """The adapter's name for metrics, None for the base."""
    return sequence.adapter.label if sequence.adapter is not None else None
