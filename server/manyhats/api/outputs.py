"""The engine's deltas for one HTTP request: several prompts run at once, failures raised, nothing
left running.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Protocol, runtime_checkable

from manyhats.api.prompts import Job
from manyhats.engine.interface import EngineClient
from manyhats.errors import EngineFailedError
from manyhats.types import FinishReason, GenerationRequest, OutputDelta

_FAILED = (FinishReason.ABORT, FinishReason.ERROR)


@runtime_checkable
class _Closable(Protocol):
    async def aclose(self) -> None: ...


async def outputs(engine: EngineClient, job: Job) -> AsyncGenerator[tuple[int, OutputDelta]]:
    """(choice index, delta) until every choice has ended, in the order in which they come.

    Raises what the engine raises, and a delta's own error; EngineFailedError where a choice was
    aborted or its deltas end without a finish reason. Closing this generator closes the engine's
    iterators, which aborts.
    """
    async with aclosing(_merged(engine, job)) as merged:
        async for prompt, delta in merged:
            if delta.error is not None:
                raise delta.error
            if delta.finish_reason in _FAILED:
                raise EngineFailedError("the request was aborted by the server")
            shown = _without_output(delta) if job.scoring else delta
            yield prompt * job.n + delta.index, shown


def _without_output(delta: OutputDelta) -> OutputDelta:
    """A scoring request's delta: the engine draws one token at the prompt's end, which nobody asked
    for.
    """
    ended = None if delta.finish_reason is None else FinishReason.LENGTH
    return replace(delta, text="", token_ids=(), logprobs=(), finish_reason=ended)


async def _merged(engine: EngineClient, job: Job) -> AsyncGenerator[tuple[int, OutputDelta]]:
    if len(job.requests) == 1:
        async with aclosing(_deltas(engine, job.requests[0])) as deltas:
            async for delta in deltas:
                yield 0, delta
        return
    queue: asyncio.Queue[tuple[int, OutputDelta | Exception | None]] = asyncio.Queue()
    pumps = [
        asyncio.create_task(_pump(i, engine, request, queue))
        for i, request in enumerate(job.requests)
    ]
    try:
        live = len(pumps)
        while live:
            prompt, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                live -= 1
            else:
                yield prompt, item
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(
    prompt: int,
    engine: EngineClient,
    request: GenerationRequest,
    queue: asyncio.Queue[tuple[int, OutputDelta | Exception | None]],
) -> None:
    """One prompt's deltas into the queue, then None; an exception goes into the queue, where it is
    raised.
    """
    try:
        async with aclosing(_deltas(engine, request)) as deltas:
            async for delta in deltas:
                queue.put_nowait((prompt, delta))
    except Exception as error:  # noqa: BLE001 - carried to the consumer, who raises it
        queue.put_nowait((prompt, error))
    else:
        queue.put_nowait((prompt, None))


async def _deltas(engine: EngineClient, request: GenerationRequest) -> AsyncGenerator[OutputDelta]:
    """One request's deltas; checks that every choice ended."""
    open_choices = set(range(len(request.params)))
    async with _closing(engine.generate(request)) as stream:
        async for delta in stream:
            if delta.finish_reason is not None:
                open_choices.discard(delta.index)
            yield delta
            if delta.error is not None:
                return
    if open_choices:
        raise EngineFailedError(
            f"the engine ended the request with {len(open_choices)} choices unfinished"
        )


@asynccontextmanager
async def _closing(
    stream: AsyncIterator[OutputDelta],
) -> AsyncIterator[AsyncIterator[OutputDelta]]:
    """Closes the engine's iterator on the way out, which aborts a request that is not done."""
    try:
        yield stream
    finally:
        if isinstance(stream, _Closable):
            await stream.aclose()
