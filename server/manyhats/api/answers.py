"""From the engine's deltas to OpenAI's answers: whole, and as chunks.

A *writer* turns one choice's deltas into pieces (the ``choices[]`` entries of chunks); the whole
answer is the pieces put together, so that streaming and not streaming cannot disagree.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

import anyio.to_thread

from manyhats.api.logprobs import CompletionLogprobs, TokenLabels, chat_logprobs, extend
from manyhats.api.prompts import Job
from manyhats.types import OutputDelta

_INLINE_LOGPROBS = 256

Outputs = AsyncGenerator[tuple[int, OutputDelta]]
"""(choice index, delta) until every choice has ended, as ``api.metering.metered`` gives them."""


class Writer(Protocol):
    """One choice of an answer."""

    async def pieces(self, delta: OutputDelta) -> Sequence[dict[str, Any]]:
        """The chunk entries that this delta gives, often one, sometimes none; call it for every
        delta in order.
        """

    def whole(self) -> dict[str, Any]:
        """The choice in full, of all deltas so far."""


class CompletionWriter:
    """A choice of ``/v1/completions``. ``echo``: the prompt's text to begin with; ``prompt``: its
    token ids.
    """

    def __init__(
        self, index: int, labels: TokenLabels, *, echo: str | None, prompt: Sequence[int]
    ) -> None:
        self._index = index
        self._echo = echo
        self._prompt = prompt
        self._logprobs = CompletionLogprobs(labels)
        self._started = False
        self._text: list[str] = []
        self._all_logprobs: dict[str, list[Any]] | None = None
        self._finish: str | None = None

    async def pieces(self, delta: OutputDelta) -> Sequence[dict[str, Any]]:
        """See Writer."""
        text = delta.text
        part: dict[str, list[Any]] | None = None
        if not self._started:
            self._started = True
            text = (self._echo or "") + text
            if self._echo is not None and delta.prompt_logprobs is not None:
                part = await self._prompt_part(delta)
        if delta.logprobs:
            part = part or {}
            extend(part, self._logprobs.generated(delta.logprobs))
        finish = None if delta.finish_reason is None else delta.finish_reason.value
        if not (text or part or finish):
            return ()
        self._keep(text, part, finish)
        return ({"index": self._index, "text": text, "logprobs": part, "finish_reason": finish},)

    def whole(self) -> dict[str, Any]:
        """See Writer."""
        return {
            "index": self._index,
            "text": "".join(self._text),
            "logprobs": self._all_logprobs,
            "finish_reason": self._finish,
        }

    async def _prompt_part(self, delta: OutputDelta) -> dict[str, list[Any]]:
        entries = delta.prompt_logprobs or ()
        if len(entries) <= _INLINE_LOGPROBS:
            return self._logprobs.prompt(self._prompt, entries)
        return await anyio.to_thread.run_sync(self._logprobs.prompt, self._prompt, entries)

    def _keep(self, text: str, part: dict[str, list[Any]] | None, finish: str | None) -> None:
        self._text.append(text)
        if part is not None:
            self._all_logprobs = self._all_logprobs or {}
            extend(self._all_logprobs, part)
        self._finish = finish or self._finish


class ChatWriter:
    """A choice of ``/v1/chat/completions``. ``logprobs``: whether they were asked for."""

    def __init__(self, index: int, labels: TokenLabels, *, logprobs: bool) -> None:
        self._index = index
        self._labels = labels
        self._wants_logprobs = logprobs
        self._started = False
        self._text: list[str] = []
        self._all_logprobs: list[dict[str, Any]] = []
        self._finish: str | None = None

    async def pieces(self, delta: OutputDelta) -> Sequence[dict[str, Any]]:
        """See Writer. As OpenAI does: the role first, then content, then the finish reason with an
        empty delta.
        """
        made: list[dict[str, Any]] = []
        if not self._started:
            self._started = True
            made.append(self._piece({"role": "assistant", "content": "", "refusal": None}))
        if delta.text or delta.logprobs:
            content = chat_logprobs(self._labels, delta.logprobs) if self._wants_logprobs else None
            made.append(self._piece({"content": delta.text}, logprobs=content))
            self._text.append(delta.text)
            self._all_logprobs += content or ()
        if delta.finish_reason is not None:
            self._finish = delta.finish_reason.value
            made.append(self._piece({}, finish=self._finish))
        return made

    def whole(self) -> dict[str, Any]:
        """See Writer."""
        content = {"content": self._all_logprobs, "refusal": None}
        return {
            "index": self._index,
            "message": {"role": "assistant", "content": "".join(self._text), "refusal": None},
            "logprobs": content if self._wants_logprobs else None,
            "finish_reason": self._finish,
        }

    def _piece(
        self,
        delta: dict[str, Any],
        *,
        logprobs: list[dict[str, Any]] | None = None,
        finish: str | None = None,
    ) -> dict[str, Any]:
        shown = None if logprobs is None else {"content": logprobs, "refusal": None}
        return {"index": self._index, "delta": delta, "logprobs": shown, "finish_reason": finish}


class Usage:
    """Counts tokens as OpenAI does: each prompt once however many choices it has, every generated
    token.
    """

    def __init__(self, job: Job) -> None:
        self._n = job.n
        self._prompt = sum(len(request.prompt_token_ids) for request in job.requests)
        self._generated = 0
        self._cached = [0] * (len(job.requests) * job.n)

    def add(self, index: int, delta: OutputDelta) -> None:
        """Counts one delta of the choice ``index``."""
        self._generated += len(delta.token_ids)
        self._cached[index] = max(self._cached[index], delta.cached_tokens)

    def shown(self) -> dict[str, Any]:
        """The ``usage`` object. A prompt's cached tokens are those of its least cached choice (the
        others may have found what the first had just computed).
        """
        cached = sum(
            min(self._cached[i : i + self._n]) for i in range(0, len(self._cached), self._n)
        )
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._generated,
            "total_tokens": self._prompt + self._generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def writers(job: Job, labels: TokenLabels, *, chat: bool) -> list[Writer]:
    """One writer a choice, in the order of their index."""
    made: list[Writer] = []
    for i, request in enumerate(job.requests):
        for j, params in enumerate(request.params):
            index = i * job.n + j
            if chat:
                made.append(ChatWriter(index, labels, logprobs=params.logprobs is not None))
            else:
                echo = None if job.echo is None else job.echo[i]
                made.append(
                    CompletionWriter(index, labels, echo=echo, prompt=request.prompt_token_ids)
                )
    return made


async def whole_answer(
    deltas: Outputs, job: Job, labels: TokenLabels, *, chat: bool
) -> dict[str, Any]:
    """The answer of a request that does not stream. Raises what ``deltas`` raises."""
    per_choice = writers(job, labels, chat=chat)
    usage = Usage(job)
    async with aclosing(deltas) as events:
        async for index, delta in events:
            usage.add(index, delta)
            await per_choice[index].pieces(delta)
    return {
        **_head(job, "chat.completion" if chat else "text_completion"),
        "choices": [writer.whole() for writer in per_choice],
        "usage": usage.shown(),
    }


async def chunks(
    deltas: Outputs, job: Job, labels: TokenLabels, *, chat: bool
) -> AsyncGenerator[dict[str, Any]]:
    """The chunks of a streamed answer, the usage chunk last where it was asked for. Raises what
    ``deltas`` raises.
    """
    per_choice = writers(job, labels, chat=chat)
    usage = Usage(job)
    head = _head(job, "chat.completion.chunk" if chat else "text_completion")
    tail: dict[str, Any] = {"usage": None} if job.include_usage else {}
    async with aclosing(deltas) as events:
        async for index, delta in events:
            usage.add(index, delta)
            for piece in await per_choice[index].pieces(delta):
                yield {**head, "choices": [piece], **tail}
    if job.include_usage:
        yield {**head, "choices": [], "usage": usage.shown()}


def _head(job: Job, kind: str) -> dict[str, Any]:
    return {
        "id": job.id,
        "object": kind,
        "created": job.created,
        "model": job.model,
        "system_fingerprint": job.fingerprint,
    }
