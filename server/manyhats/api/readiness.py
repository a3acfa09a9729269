"""Whether traffic should come here: proven by a generation at start, taken back before a drain."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import anyio

from manyhats.engine.interface import EngineClient
from manyhats.errors import EngineFailedError, ManyhatsError
from manyhats.types import DEFAULT_TENANT, GenerationRequest, SamplingParams

logger = logging.getLogger(__name__)

RETRY_S: Final = 5.0
"""Seconds between two probes of a base that has not answered."""
_PROBE: Final = "Hello"


class Readiness:
    """Two flags: ``proven`` goes up once, with the base's first answer; ``draining`` goes up for
    good, before anything is refused. A signal handler may call ``drain``.
    """

    def __init__(self, *, proven: bool = False) -> None:
        """``proven`` for those who know that the base answers."""
        self._proven = asyncio.Event()
        if proven:
            self._proven.set()
        self._draining = False
        self._failure: str | None = None

    @property
    def proven(self) -> bool:
        """Whether the base has answered since the start."""
        return self._proven.is_set()

    async def wait_proven(self) -> None:
        """Until the base has answered."""
        await self._proven.wait()

    @property
    def draining(self) -> bool:
        """Whether the server is about to end."""
        return self._draining

    def drain(self) -> None:
        """Not ready from now on; requests that still come are taken until the door closes."""
        self._draining = True

    def reason(self, engine: EngineClient) -> str | None:
        """Why no traffic should come here; None where it should."""
        if self.draining:
            return "the server is draining: it is about to end"
        if not engine.ready:
            return "the engine takes no requests: it is starting, draining or stopped"
        if not self.proven:
            why = f": {self._failure}" if self._failure else " yet"
            return f"the base has not answered its probe{why}"
        return None

    async def prove(self, engine: EngineClient) -> None:
        """Asks the base for one token, again every ``RETRY_S`` until it has given one."""
        while not self.proven:
            try:
                seconds = await probe(engine)
            except ManyhatsError as error:
                self._failure = error.message
                logger.error("the base has not answered its probe: %s", error.message)
                await anyio.sleep(RETRY_S)
            else:
                self._proven.set()
                logger.info("ready: the base answered its probe in %.0f ms", seconds * 1000)

    @asynccontextmanager
    async def proving(self, engine: EngineClient) -> AsyncIterator[None]:
        """``prove`` beside the block, ended with it."""
        async with anyio.create_task_group() as group:
            group.start_soon(self.prove, engine)
            try:
                yield
            finally:
                group.cancel_scope.cancel()


async def probe(engine: EngineClient) -> float:
    """Seconds that the bare base took for one token of one prompt, through the whole engine.

    Raises EngineFailedError where the token's log-probability is not finite, and what the engine
    raises or answers.
    """
    started = time.monotonic()
    token_ids = tuple(engine.tokenizer.encode(_PROBE)) or (0,)
    params = SamplingParams(seed=0, max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=0)
    request = GenerationRequest(
        request_id=f"probe-{started}",
        tenant=DEFAULT_TENANT,
        prompt_token_ids=token_ids,
        params=(params,),
        adapter=None,
        arrival=started,
    )
    scores: list[float] = []
    error: ManyhatsError | None = None
    async for delta in engine.generate(request):
        error = error or delta.error
        scores += [entry.logprob for entry in delta.logprobs]
    if error is not None:
        raise error
    if not scores or not all(map(math.isfinite, scores)):
        raise EngineFailedError(f"the base's log-probabilities are {scores}")
    return time.monotonic() - started
