"""A deterministic engine without a model, for tests of the HTTP surface: bytes are tokens."""

from __future__ import annotations

import asyncio
import codecs
import difflib
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

from manyhats.engine.interface import (
    ChatTemplateError,
    CompareRequest,
    EngineStats,
    LaneScores,
    ModelInfo,
    ResidentAdapter,
)
from manyhats.errors import ManyhatsError, ModelNotFoundError, RequestError
from manyhats.lifecycle.directory import AdapterCard
from manyhats.lifecycle.routes import RouteHint
from manyhats.types import (
    AdapterRef,
    Digest,
    FinishReason,
    GenerationRequest,
    GrammarSpec,
    OutputDelta,
    SamplingParams,
    TenantId,
    TokenLogprob,
)

BOS, EOS = 256, 257
VOCAB = 300
CONTEXT = 200
BASE = "org/base"
SPECIAL = {BOS: "<s>", EOS: "</s>"}


class ByteTokenizer:
    """Token i < 256 is the byte i. ``bos``: whether encode puts BOS first."""

    def __init__(self, *, bos: bool = False) -> None:
        self.bos = bos
        self.encoded_on: list[str] = []

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.encoded_on.append(threading.current_thread().name)
        return [BOS] * (self.bos and add_special_tokens) + list(text.encode())

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        parts = (b"" if i > 255 and skip_special_tokens else self.token_bytes(i) for i in token_ids)
        return b"".join(parts).decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return SPECIAL.get(token_id, "").encode() if token_id > 255 else bytes([token_id])

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        if messages[0]["role"] == "assistant":
            raise ChatTemplateError("the first message must not be the assistant's")
        return "".join(f"{m['role'][0]}:{m['content']}\n" for m in messages) + "a:"


def reply_of(adapter: AdapterRef | None, params: SamplingParams) -> str:
    """What the fake says: who speaks, the seed, and a character of two bytes."""
    return f"{adapter or 'base'} #{params.seed % 1000} é!"


def logprob_of(token_id: int) -> float:
    return -1.0 - token_id / 256


def entry_of(token_id: int, alternatives: int) -> TokenLogprob:
    """The chosen token is not among the alternatives; the first is an incomplete byte."""
    others = [(0xC3, -0.25), *((token_id + 1 + k, -0.5 - k) for k in range(alternatives))]
    return TokenLogprob(token_id, logprob_of(token_id), tuple(others[:alternatives]))


@dataclass
class FakeEngine:
    """Implements EngineClient. The ``*_after`` fields count generated tokens of one choice."""

    tokenizer: ByteTokenizer = field(default_factory=ByteTokenizer)
    ready: bool = True
    failed: bool = False
    refuse: ManyhatsError | None = None
    error: ManyhatsError | None = None
    error_after: int = 3
    crash_after: int | None = None
    hang_after: int | None = None
    vanish_after: int | None = None
    abort_after: int | None = None
    requests: list[GenerationRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    compared: list[CompareRequest] = field(default_factory=list)
    kept: dict[tuple[str, int], object] = field(default_factory=dict)
    hanging: asyncio.Event | None = None
    live: int = 0

    @property
    def model(self) -> ModelInfo:
        return ModelInfo(
            id=BASE,
            digest="ab" * 32,
            created=1_700_000_000,
            context_len=CONTEXT,
            vocab_size=VOCAB,
            eos_token_ids=frozenset({EOS}),
            quantization="nf4",
            dtype="bf16",
            device="cpu",
            kernel_backend="reference",
            kernel_reason="asked for by name",
        )

    def stats(self) -> EngineStats:
        ref = AdapterRef("pirate", 2, Digest("cd" * 32))
        return EngineStats(
            running=3,
            waiting=4,
            kv_blocks_total=100,
            kv_blocks_used=25,
            kv_block_size=16,
            slots_total=8,
            rows_total=128,
            rows_used=32,
            host_bytes_used=1000,
            host_bytes_total=5000,
            resident=(
                ResidentAdapter(ref, 0, 2, False),
                ResidentAdapter(AdapterRef("haiku", 1, Digest("ef" * 32)), 1, 0, True),
            ),
            waiting_adapters=("formal@3", "pirate@1"),
            steps=11,
            failed_steps=1,
        )

    async def generate(self, request: GenerationRequest) -> AsyncIterator[OutputDelta]:
        if self.refuse is not None:
            raise self.refuse
        self.requests.append(request)
        self.live += 1
        done = False
        try:
            for position in range(CONTEXT):
                await asyncio.sleep(0)
                ended = 0
                for index, params in enumerate(request.params):
                    delta = self._delta(request, index, params, position)
                    if delta is not None:
                        yield delta
                        if delta.error is not None:
                            done = True
                            return
                    ended += self._length(request, params) <= position + 1
                if ended == len(request.params):
                    break
                await self._misbehave(position + 1)
                if self.vanish_after == position + 1:
                    break
            done = True
        finally:
            self.live -= 1
            if not done:
                self.aborted.append(request.request_id)

    max_compared_tokens = 64

    async def compare(self, request: CompareRequest) -> tuple[LaneScores, ...]:
        """The base and first versions know every answer; others are sure of something else."""
        await asyncio.sleep(0)
        self.compared.append(request)
        answer = request.token_ids[request.answer_start :]
        lanes = []
        for number, adapter in enumerate(request.adapters):
            wrong = adapter is not None and adapter.version > 1
            other = wrong != (request.adapters[0] is not None and request.adapters[0].version > 1)
            lanes.append(
                LaneScores(
                    adapter,
                    tuple(-9.0 if wrong else -0.5 for _ in answer),
                    tuple(0 if wrong else token for token in answer),
                    tuple(0.75 for _ in answer),
                    tuple(1.0 for _ in answer),
                    tuple(8.0 if other else 0.0 for _ in answer) if number else (),
                    tuple(not other for _ in answer) if number else (),
                    (0.0,),
                )
            )
        return tuple(lanes)

    def _length(self, request: GenerationRequest, params: SamplingParams) -> int:
        return min(len(reply_of(request.adapter, params).encode()) + 1, params.max_tokens)

    async def _misbehave(self, count: int) -> None:
        if self.crash_after == count:
            raise RuntimeError("a defect with a secret inside")
        if self.hang_after == count:
            if self.hanging is not None:
                self.hanging.set()
            await asyncio.Event().wait()

    def _delta(
        self, request: GenerationRequest, index: int, params: SamplingParams, position: int
    ) -> OutputDelta | None:
        reply = [*reply_of(request.adapter, params).encode(), EOS]
        length = self._length(request, params)
        if position >= length:
            return None
        token = reply[position]
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(bytes(reply[:position]))
        last = position + 1 == length
        text = "" if token == EOS else decoder.decode(bytes([token]), final=last)
        finish = None
        if last:
            finish = FinishReason.STOP if token == EOS else FinishReason.LENGTH
        if self.abort_after == position:
            finish = FinishReason.ABORT
        prompt_logprobs = None
        if position == 0 and params.prompt_logprobs is not None:
            prompt = request.prompt_token_ids
            known = [entry_of(i, params.prompt_logprobs) for i in prompt[1:]]
            prompt_logprobs = (None, *known)
        kept = None
        if finish is not None and request.keeps_logits:
            kept = self.kept[request.request_id, index] = [None] * length
        return OutputDelta(
            request_id=request.request_id,
            index=index,
            text=text,
            token_ids=(token,),
            logprobs=() if params.logprobs is None else (entry_of(token, params.logprobs),),
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish,
            error=self.error if position == self.error_after else None,
            cached_tokens=min(4 + index, len(request.prompt_token_ids)),
            admitted_at=time.monotonic() if position == 0 else None,
            kept=kept,
        )


class FakeDirectory:
    """Implements AdapterDirectory: pirate@1, pirate@2, haiku@1."""

    def __init__(self) -> None:
        self.cards = [
            AdapterCard(
                AdapterRef(name, version, Digest(digest * 32)), "lora", 8, 4096, created, stable
            )
            for name, version, digest, created, stable in (
                ("pirate", 1, "01", 1_700_000_001, False),
                ("pirate", 2, "cd", 1_700_000_002, True),
                ("haiku", 1, "ef", 1_700_000_003, True),
            )
        ]
        self.hints: list[RouteHint | None] = []

    def resolve(
        self, model: str, tenant: TenantId, hint: RouteHint | None = None
    ) -> AdapterRef | None:
        self.hints.append(hint)
        if model == BASE:
            return None
        for card in reversed(self.cards):
            if model in (card.ref.name, str(card.ref)):
                return card.ref
        names = [BASE, *(card.ref.name for card in self.cards)]
        near = ", ".join(difflib.get_close_matches(model, names)) or "none"
        raise ModelNotFoundError(f"no model {model!r}; near names: {near}", param="model")

    def list(self, tenant: TenantId) -> Sequence[AdapterCard]:
        return self.cards


class FakeGrammar:
    """Implements GrammarValidator: refuses a schema that holds the word ``impossible``."""

    def __init__(self) -> None:
        self.seen: list[GrammarSpec] = []

    def check(self, spec: GrammarSpec) -> None:
        self.seen.append(spec)
        if "impossible" in (spec.schema or ""):
            raise RequestError(
                "response_format: this schema cannot be enforced", param="response_format"
            )
