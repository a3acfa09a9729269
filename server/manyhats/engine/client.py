"""The engine from the event loop's side: requests in, an asynchronous stream of deltas out."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Final

from manyhats.engine.compare import LaneProbe
from manyhats.engine.interface import (
    CompareRequest,
    EngineStats,
    LaneScores,
    ModelInfo,
    Tokenizer,
)
from manyhats.engine.kept import KeptAnswer
from manyhats.engine.loop import EngineLoop
from manyhats.engine.postprocess import RowProbe
from manyhats.errors import RequestError
from manyhats.types import GenerationRequest, OutputDelta, Priority, SamplingParams

_COMPARISONS: Final = 4
"""Comparisons at once: each keeps logits while its further lanes run."""

_ROWS_AT_ONCE: Final = 16
"""Kept logits that are looked at between two steps: some milliseconds on a CPU."""


@dataclass(frozen=True, slots=True)
class _Mail:
    """Where one request's deltas go."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[list[OutputDelta]]


class Postbox:
    """Carries deltas from the step thread to each request's queue, one wake-up a step and event
    loop.
    """

    def __init__(self) -> None:
        self._mails: dict[str, _Mail] = {}

    def open(self, request_id: str) -> asyncio.Queue[list[OutputDelta]]:
        """A queue for a request of the running event loop. Raises ValueError on an id that is in
        use.
        """
        if request_id in self._mails:
            raise ValueError(f"request id {request_id!r} is in use")
        mail = _Mail(asyncio.get_running_loop(), asyncio.Queue())
        self._mails[request_id] = mail
        return mail.queue

    def close(self, request_id: str) -> None:
        """Forgets a request; what still comes for it is let go."""
        self._mails.pop(request_id, None)

    def deliver(self, deltas: Sequence[OutputDelta]) -> None:
        """Called on the step thread."""
        batches: dict[asyncio.AbstractEventLoop, dict[str, list[OutputDelta]]] = {}
        for delta in deltas:
            mail = self._mails.get(delta.request_id)
            if mail is not None:
                batches.setdefault(mail.loop, {}).setdefault(delta.request_id, []).append(delta)
        for loop, batch in batches.items():
            try:
                loop.call_soon_threadsafe(self._hand_out, batch)
            except RuntimeError:  # it is closed: nobody reads any longer
                if not loop.is_closed():
                    raise

    def _hand_out(self, batch: dict[str, list[OutputDelta]]) -> None:
        for request_id, deltas in batch.items():
            mail = self._mails.get(request_id)
            if mail is not None:
                mail.queue.put_nowait(deltas)


class AsyncEngine:
    """Implements ``engine.interface.EngineClient`` over the step loop."""

    def __init__(
        self,
        loop: EngineLoop,
        postbox: Postbox,
        model: ModelInfo,
        tokenizer: Tokenizer,
        *,
        max_compared_tokens: int,
    ) -> None:
        self._max_compared_tokens = max_compared_tokens
        self._comparing = asyncio.Semaphore(_COMPARISONS)
        self._loop = loop
        self._postbox = postbox
        self._model = model
        self._tokenizer = tokenizer

    @property
    def model(self) -> ModelInfo:
        """The base model."""
        return self._model

    @property
    def tokenizer(self) -> Tokenizer:
        """The base model's tokenizer."""
        return self._tokenizer

    @property
    def ready(self) -> bool:
        """Whether the step loop takes requests."""
        return self._loop.accepting

    @property
    def failed(self) -> bool:
        """Whether the step loop has ended by a defect."""
        return self._loop.failed

    def stats(self) -> EngineStats:
        """The latest snapshot."""
        return self._loop.stats()

    @property
    def max_compared_tokens(self) -> int:
        """The longest answer that several lanes are compared over."""
        return self._max_compared_tokens

    async def compare(self, request: CompareRequest) -> tuple[LaneScores, ...]:
        """See ``EngineClient.compare``."""
        self._check(request)
        several = len(request.adapters) > 1
        probes = _kept(request)
        async with self._comparing:
            for probe in probes:
                look = partial(probe.catch_up, _ROWS_AT_ONCE)
                while await asyncio.wrap_future(self._loop.between_steps(look)):
                    pass
            for adapter in request.adapters[len(probes) :]:
                first = probes[0] if probes else None
                start = request.answer_start if first is None else request.others_start
                targets = request.token_ids[start:]
                probe = LaneProbe(adapter, targets, first=first, keep=several and first is None)
                lane = GenerationRequest(
                    request_id=f"compare-{uuid.uuid4().hex}",
                    tenant=request.tenant,
                    prompt_token_ids=request.token_ids,
                    params=(SamplingParams(max_tokens=0, seed=0, prompt_logprobs=0),),
                    adapter=adapter,
                    arrival=time.monotonic(),
                    priority=Priority.BACKGROUND,
                    scores_from=start,
                )
                await self.probe(lane, probe)
                probes.append(probe)
        return tuple(probe.scores() for probe in probes)

    def _check(self, request: CompareRequest) -> None:
        if not request.adapters:
            raise RequestError("adapters: at least one lane is needed", param="adapters")
        for adapter in request.adapters:
            if adapter is not None and adapter.is_ensemble:
                raise RequestError(
                    f"adapters: {adapter} is an ensemble, whose scores of given tokens are not "
                    "served; its members can be compared",
                    param="adapters",
                )
        answer = len(request.token_ids) - request.answer_start
        if request.answer_start < 1 or answer < 1:
            raise RequestError(
                f"answer_start is {request.answer_start} of {len(request.token_ids)} tokens: at "
                "least one must lie before it and one behind",
                param="answer_start",
            )
        if not 1 <= request.others_start <= request.answer_start:
            raise RequestError(
                f"others_from is {request.others_from}; it must be 1 to answer_start "
                f"({request.answer_start}), or 0 for that",
                param="others_from",
            )
        if len(request.adapters) > 1 and answer > self._max_compared_tokens:
            raise RequestError(
                f"the answer has {answer} tokens; several lanes are compared over at most "
                f"{self._max_compared_tokens} (compare_mb)",
                param="token_ids",
            )

    def generate(self, request: GenerationRequest) -> AsyncIterator[OutputDelta]:
        """See ``EngineClient.generate``."""
        return self._run(request, None)

    async def probe(self, request: GenerationRequest, probe: RowProbe) -> None:
        """Gives ``probe`` the rows of the request's prompt. Raises what ``generate`` does, and the
        request's error.
        """
        async with aclosing(self._run(request, probe)) as deltas:
            async for delta in deltas:
                if delta.error is not None:
                    raise delta.error

    async def _run(
        self, request: GenerationRequest, probe: RowProbe | None
    ) -> AsyncGenerator[OutputDelta, None]:
        queue = self._postbox.open(request.request_id)
        open_choices = len(request.params)
        submitted = False
        try:
            self._loop.submit(request, probe)
            submitted = True
            while open_choices:
                for delta in await queue.get():
                    open_choices -= delta.finish_reason is not None
                    if delta.error is not None:
                        open_choices = 0
                    yield delta
        finally:
            self._postbox.close(request.request_id)
            if submitted and open_choices:
                self._loop.abort(request.request_id)


def _kept(request: CompareRequest) -> list[LaneProbe]:
    """The first lane, where all of its answer was kept as it was drawn."""
    if not isinstance(request.kept, KeptAnswer):
        return []
    lane = request.kept.lane(request.adapters[0], request.token_ids[request.answer_start :])
    return [] if lane is None else [lane]
