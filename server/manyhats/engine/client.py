"""The engine from the event loop's side: requests in, an asynchronous stream of deltas out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from manyhats.engine.interface import EngineStats, ModelInfo, Tokenizer
from manyhats.engine.loop import EngineLoop
from manyhats.types import GenerationRequest, OutputDelta


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
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._hand_out, batch)

    def _hand_out(self, batch: dict[str, list[OutputDelta]]) -> None:
        for request_id, deltas in batch.items():
            mail = self._mails.get(request_id)
            if mail is not None:
                mail.queue.put_nowait(deltas)


class AsyncEngine:
    """Implements ``engine.interface.EngineClient`` over the step loop."""

    def __init__(
        self, loop: EngineLoop, postbox: Postbox, model: ModelInfo, tokenizer: Tokenizer
    ) -> None:
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

    async def generate(self, request: GenerationRequest) -> AsyncIterator[OutputDelta]:
        """See ``EngineClient.generate``."""
        queue = self._postbox.open(request.request_id)
        open_choices = len(request.params)
        submitted = False
        try:
            self._loop.submit(request)
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
