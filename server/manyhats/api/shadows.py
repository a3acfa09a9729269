"""Runs shadows: once an answer is out, the same request on another version in the background.

The live request never waits for it: its deltas pass through, its tokens are kept, and what the
shadow does afterwards nobody sees but the metrics.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from manyhats.engine.interface import CompareRequest, EngineClient
from manyhats.errors import ManyhatsError, QueueFullError
from manyhats.lifecycle.shadows import ShadowDirectory
from manyhats.metrics.shadow import ShadowMetrics
from manyhats.types import AdapterRef, GenerationRequest, OutputDelta, Priority

if TYPE_CHECKING:
    from manyhats.api.prompts import Job  # which stands on the state that this is part of

logger = logging.getLogger(__name__)

MAX_RUNNING: Final = 8
"""Shadows at once; a sample over it is dropped."""

Deltas = AsyncGenerator[tuple[int, OutputDelta]]


class Shadows:
    """The shadows of one server. Confined to the event loop."""

    def __init__(
        self, directory: ShadowDirectory, engine: EngineClient, metrics: ShadowMetrics
    ) -> None:
        self._directory = directory
        self._engine = engine
        self._metrics = metrics
        self._running: set[asyncio.Task[None]] = set()

    def beside(self, job: Job, deltas: Deltas) -> Deltas:
        """``deltas`` themselves, watched where a shadow is to run once they have ended."""
        if job.scoring:
            return deltas
        shadow = self._directory.sample(job.model, job.tenant, job.adapter)
        return deltas if shadow is None else self._watched(job, deltas, shadow)

    async def close(self) -> None:
        """End what runs."""
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _watched(self, job: Job, deltas: Deltas, shadow: AdapterRef) -> Deltas:
        answered: list[int] = []
        async with aclosing(deltas):
            async for index, delta in deltas:
                if index == 0:
                    answered += delta.token_ids
                yield index, delta
        self._start(job, shadow, tuple(answered))

    def _start(self, job: Job, shadow: AdapterRef, answered: tuple[int, ...]) -> None:
        if len(self._running) >= MAX_RUNNING:
            self._metrics.dropped(shadow.name)
            return
        task = asyncio.get_running_loop().create_task(self._run(job, shadow, answered))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _run(self, job: Job, shadow: AdapterRef, answered: tuple[int, ...]) -> None:
        """The first choice of the first prompt, on the shadow."""
        live = job.requests[0]
        request = replace(
            live,
            request_id=f"shadow-{uuid.uuid4().hex}",
            params=(replace(live.params[0], logprobs=None, prompt_logprobs=None),),
            adapter=shadow,
            arrival=time.monotonic(),
            priority=Priority.BACKGROUND,
            deadline=None,
        )
        try:
            tokens = await self._tokens(request)
            seconds = time.monotonic() - request.arrival
            nll = await self._nll(live, shadow, answered)
        except QueueFullError:
            self._metrics.dropped(shadow.name)
        except ManyhatsError as error:
            logger.warning("the shadow %s failed: %s", shadow, error.message)
            self._metrics.failed(shadow.name)
        except Exception:
            logger.exception("the shadow %s failed", shadow)
            self._metrics.failed(shadow.name)
        else:
            self._metrics.ran(shadow.name, len(tokens), seconds, agreement(answered, tokens), nll)

    async def _tokens(self, request: GenerationRequest) -> list[int]:
        tokens: list[int] = []
        async for delta in self._engine.generate(request):
            if delta.error is not None:
                raise delta.error
            tokens += delta.token_ids
        return tokens

    async def _nll(
        self, live: GenerationRequest, shadow: AdapterRef, answered: tuple[int, ...]
    ) -> float | None:
        if not answered or shadow.is_ensemble:  # whose scores of given tokens are not served
            return None
        prompt = live.prompt_token_ids
        lanes = CompareRequest(live.tenant, (*prompt, *answered), len(prompt), (shadow,))
        [scores] = await self._engine.compare(lanes)
        return -sum(scores.logprobs) / len(answered)


def agreement(answered: tuple[int, ...], tokens: list[int]) -> float:
    """The share of positions with equal tokens, of the longer of both; 1 where both are empty."""
    longest = max(len(answered), len(tokens))
    equal = sum(a == b for a, b in zip(answered, tokens, strict=False))
    return equal / longest if longest else 1.0
