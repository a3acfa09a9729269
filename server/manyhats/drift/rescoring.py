"""Sampled requests scored again by the bare base (a canary's by the stable version too).

A bounded queue and one comparison at a time, at the engine's background priority: when the engine
is busy samples are dropped and counted, never live requests delayed.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from manyhats.drift.signals.finished import Ending, Finished
from manyhats.drift.signals.rescored import Rescored
from manyhats.errors import ManyhatsError
from manyhats.types import AdapterRef, KeptLogits, TenantId

logger = logging.getLogger(__name__)


class Lane(Protocol):
    """What one version says of each token compared (``engine.interface.LaneScores``)."""

    @property
    def logprobs(self) -> Sequence[float]:
        """Of the token itself, in nats."""

    @property
    def entropies(self) -> Sequence[float]:
        """Of the distribution, in nats."""

    @property
    def divergences(self) -> Sequence[float]:
        """KL(first lane || this one) of the answer's tokens, in nats; empty of the first."""

    @property
    def agreements(self) -> Sequence[bool]:
        """Whether both top choices of them are the same; empty of the first."""

    @property
    def hidden_mean(self) -> Sequence[float]:
        """The mean last hidden state."""


class Compare(Protocol):
    """Scores tokens from ``start`` on with each of ``adapters`` (None: the base), teacher-forced;
    all but the first from ``others_from`` on. ``kept``: what there is of the first lane already.
    Raises ManyhatsError.
    """

    async def __call__(
        self,
        tenant: TenantId,
        token_ids: tuple[int, ...],
        start: int,
        adapters: tuple[AdapterRef | None, ...],
        others_from: int,
        kept: KeptLogits | None,
    ) -> Sequence[Lane]:
        """See Compare."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One request to score; ``stable``: the version that its canary stands beside, or None."""

    done: Finished
    stable: AdapterRef | None


Found = Callable[[Sample, Rescored, Rescored | None], None]
"""Told of each sample: against the base, and against the stable version where there is one."""


class Rescorer:
    """Belongs to the event loop. ``longest``: tokens that can be compared at once."""

    def __init__(
        self,
        compare: Compare,
        found: Found,
        dropped: Callable[[str], None],
        *,
        longest: int,
        waiting: int = 32,
    ) -> None:
        self._compare = compare
        self._found = found
        self._dropped = dropped
        self._longest = longest
        self._queue: asyncio.Queue[Sample] = asyncio.Queue(waiting)

    def offer(self, sample: Sample) -> None:
        """Queue a sample; where there is no room it is dropped and counted. Never blocks."""
        done = sample.done
        if done.ending is Ending.ERROR or not done.token_ids:
            return
        if len(done.token_ids) > self._longest:
            self._dropped("too_long")
            return
        try:
            self._queue.put_nowait(sample)
        except asyncio.QueueFull:
            self._dropped("rescoring")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Samples are scored while the block runs."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            sample = await self._queue.get()
            try:
                await self._score(sample)
            except ManyhatsError as error:
                logger.debug("a sample was not rescored: %s", error.message)
                self._dropped("failed")
            except Exception:
                logger.exception("rescoring failed")
                self._dropped("failed")

    async def _score(self, sample: Sample) -> None:
        done = sample.done
        tokens = done.prompt_token_ids + done.token_ids
        adapters: tuple[AdapterRef | None, ...] = (done.adapter, None)
        if sample.stable is not None:
            adapters += (sample.stable,)
        # The own lane is for the answer alone; the base's perplexity of the prompt needs it whole.
        start = len(done.prompt_token_ids)
        lanes = await self._compare(done.tenant, tokens, start, adapters, 1, done.kept)
        beside = rescored(lanes[0], lanes[2], start - 1) if len(lanes) > 2 else None
        self._found(sample, rescored(lanes[0], lanes[1], start - 1), beside)


def rescored(own: Lane, other: Lane, head: int) -> Rescored:
    """Two lanes: ``own`` over the answer, ``other`` over ``head`` tokens of the prompt as well,
    which are all of it after its first.
    """
    prompt = other.logprobs[:head]
    return Rescored(
        own_logprobs=own.logprobs,
        other_logprobs=other.logprobs[head:],
        kl=other.divergences,
        agrees=other.agreements,
        entropy=own.entropies,
        prompt_nll=-sum(prompt) / len(prompt) if prompt else None,
        hidden=other.hidden_mean,
    )


def is_sampled(request_id: str, share: float) -> bool:
    """Whether a request is among the ``share`` (0 to 1) that is scored again: by a hash of its id,
    so that nothing about it has a say.
    """
    digest = hashlib.blake2b(request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:7], "big") < share * 2**56
