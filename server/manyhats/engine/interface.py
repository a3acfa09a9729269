"""What the API sees of the engine, and what the engine tells its observer: protocols and plain
values.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from manyhats.types import (
    AdapterRef,
    FinishReason,
    GenerationRequest,
    KeptLogits,
    OutputDelta,
    TenantId,
)


class ChatTemplateError(ValueError):
    """The model's chat template is missing or refused the messages."""


class Tokenizer(Protocol):
    """The tokenizer as the API uses it. Every call is thread-safe."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids."""

    def token_text(self, token_id: int) -> str:
        """One token as text (invalid UTF-8 shown as replacement characters), for ``logprobs``."""

    def token_bytes(self, token_id: int) -> bytes:
        """One token's own bytes, for ``logprobs``."""

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The chat template applied, generation prompt added. Raises ChatTemplateError."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The base model as it is served. ``context_len`` in tokens; ``created`` in Unix seconds.

    ``kernel_reason`` says why ``kernel_backend`` is the one in use.
    """

    id: str
    digest: str
    created: int
    context_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    quantization: str
    dtype: str
    device: str
    kernel_backend: str
    kernel_reason: str = ""


@dataclass(frozen=True, slots=True)
class ResidentAdapter:
    """One adapter on the device. ``leases``: sequences that hold it now."""

    ref: AdapterRef
    slot: int
    leases: int
    pinned: bool


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot between two steps. ``running`` and ``waiting`` are live sequences, background ones
    are counted apart. ``waiting_adapters``: on their way or waiting for a slot.
    """

    running: int
    waiting: int
    kv_blocks_total: int
    kv_blocks_used: int
    kv_block_size: int
    slots_total: int
    rows_total: int
    rows_used: int
    host_bytes_used: int
    host_bytes_total: int
    resident: tuple[ResidentAdapter, ...]
    waiting_adapters: tuple[str, ...]
    steps: int
    failed_steps: int
    background_running: int = 0
    background_waiting: int = 0


@dataclass(frozen=True, slots=True)
class CompareRequest:
    """The same tokens for several versions of the model. ``token_ids``: prompt, then answer, whose
    first token is at ``answer_start`` (at least 1: something must predict it). ``adapters``: one or
    more lanes, None for the bare base; the others are compared with the first. ``others_from``: an
    earlier token, from which the others are scored by themselves, 0: the answer's first. ``kept``:
    what the engine kept of the first lane's own answer, which then is not computed again; where it
    is not whole, it is.
    """

    tenant: TenantId
    token_ids: tuple[int, ...]
    answer_start: int
    adapters: tuple[AdapterRef | None, ...]
    others_from: int = 0
    kept: KeptLogits | None = None

    @property
    def others_start(self) -> int:
        """The first token that the lanes after the first are scored of."""
        return self.others_from or self.answer_start


@dataclass(frozen=True, slots=True)
class LaneScores:
    """What one version of the model says of each token scored, in their order.

    ``logprobs``: of the token itself, in nats. ``top_ids``: the likeliest token (of equals
    any one). ``confidences``: its probability. ``entropies``: of the distribution, in nats.
    ``divergences``: KL(first lane || this lane) over the full vocabulary, in nats, and
    ``agreements``: whether both likeliest tokens are the same; both of the answer's tokens alone,
    and empty for the first lane. ``hidden_mean``: what the head is given (the final norm's output),
    mean over the positions that predict the tokens scored, in fp32; empty of a lane that was kept.
    """

    adapter: AdapterRef | None
    logprobs: tuple[float, ...]
    top_ids: tuple[int, ...]
    confidences: tuple[float, ...]
    entropies: tuple[float, ...]
    divergences: tuple[float, ...]
    agreements: tuple[bool, ...]
    hidden_mean: tuple[float, ...]


class EngineClient(Protocol):
    """The engine from the event loop's side."""

    @property
    def model(self) -> ModelInfo:
        """The base model."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The base model's tokenizer."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[OutputDelta]:
        """Deltas of every choice until each has a finish reason or an error.

        Raises QueueFullError or DrainingError at the first iteration, before anything was queued.
        Closing the iterator early aborts the request (blocks and leases are freed within one step).
        A delta with ``error`` set is the last one of the request.
        """

    async def compare(self, request: CompareRequest) -> tuple[LaneScores, ...]:
        """Score the answer with each of the adapters, in their order, at background priority.

        Raises RequestError or ContextLengthError for tokens that cannot be compared, QueueFullError
        where too much background work waits, DrainingError, AdapterLoadError or EngineFailedError.
        Cancelling ends the work within a step.
        """

    @property
    def max_compared_tokens(self) -> int:
        """The longest answer that several lanes are compared over."""

    def stats(self) -> EngineStats:
        """The latest snapshot; never blocks on the step loop."""

    @property
    def ready(self) -> bool:
        """Whether the step loop runs and takes requests (false while draining)."""

    @property
    def failed(self) -> bool:
        """Whether the step loop has ended by a defect: only a new process helps."""


class EngineObserver(Protocol):
    """Told of what happens, on the engine's own threads; must be quick and must not raise.
    Implemented by metrics.
    """

    def step(self, seconds: float, prefill_tokens: int, decode_tokens: int, sequences: int) -> None:
        """A step was run."""

    def queued(self, adapter: str | None, seconds: float) -> None:
        """A sequence was admitted for the first time after waiting ``seconds``."""

    def first_token(self, adapter: str | None, seconds: float, request_id: str = "") -> None:
        """A sequence's first token came ``seconds`` after arrival."""

    def inter_token(self, adapter: str | None, seconds: float) -> None:
        """A further token came ``seconds`` after the one before."""

    def finished(
        self,
        adapter: str | None,
        reason: FinishReason,
        prompt_tokens: int,
        cached_tokens: int,
        output_tokens: int,
        seconds: float,
        request_id: str = "",
    ) -> None:
        """A sequence ended."""

    def preempted(self) -> None:
        """A sequence lost its blocks and will be recomputed."""

    def adapter_loaded(self, adapter: str, tier: str, seconds: float) -> None:
        """An adapter came to ``tier`` (``host`` or ``device``)."""

    def adapter_load_failed(self, adapter: str) -> None:
        """An adapter could not be loaded."""

    def adapter_evicted(self, adapter: str, tier: str) -> None:
        """An adapter left ``tier``."""
