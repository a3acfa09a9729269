"""A real engine in the test's own process, without HTTP: requests in, whole outputs out."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.server import share_caches
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from manyhats.adapters.parts import CompiledAdapter
from manyhats.config import Settings
from manyhats.engine.build import Engine, build_engine
from manyhats.engine.kernels import resolve_kernels
from manyhats.engine.model.load import BaseModel, wrap_base
from manyhats.errors import ManyhatsError
from manyhats.metrics import Metrics
from manyhats.types import (
    DEFAULT_TENANT,
    AdapterRef,
    Digest,
    FinishReason,
    GenerationRequest,
    OutputDelta,
    Priority,
    SamplingParams,
    TenantId,
    TokenLogprob,
)


@dataclass
class Output:
    """One finished choice."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    error: ManyhatsError | None = None
    cached_tokens: int = 0

    def add(self, delta: OutputDelta) -> None:
        self.token_ids += delta.token_ids
        self.text += delta.text
        self.logprobs += delta.logprobs
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.error = delta.error or self.error
        self.cached_tokens = max(self.cached_tokens, delta.cached_tokens)


def params(max_tokens: int = 16, **fields: Any) -> SamplingParams:
    """Greedy parameters unless said otherwise."""
    return SamplingParams(**({"max_tokens": max_tokens, "seed": 0, "temperature": 0.0} | fields))


class LocalEngine:
    """Builds, starts and drives an engine; use as a context manager."""

    def __init__(
        self,
        base: BaseModel,
        home: Path,
        adapters: Mapping[str, CompiledAdapter] | None = None,
        *,
        load_adapter: Callable[[Digest], CompiledAdapter] | None = None,
        **settings: Any,
    ) -> None:
        self.adapters = dict(adapters or {})
        by_digest = {a.digest: a for a in self.adapters.values()}
        share_caches(home)
        self.settings = Settings(home=home, **({"kernels": "torch", "kv_cache_mb": 64} | settings))
        kernels = resolve_kernels(self.settings.kernels, device=base.device, home=home)
        self.metrics = Metrics(self.settings.metrics_adapters)
        self._mail: queue.Queue[list[OutputDelta]] = queue.Queue()
        self.engine: Engine = build_engine(
            self.settings,
            base,
            kernels,
            load_adapter=load_adapter or by_digest.__getitem__,
            observer=self.metrics,
            deliver=lambda deltas: self._mail.put(list(deltas)),
        )
        self._ids = 0
        self._outputs: dict[str, list[Output]] = {}

    def __enter__(self) -> LocalEngine:
        self.engine.loop.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.loop.stop()

    def ref(self, name: str) -> AdapterRef:
        adapter = self.adapters[name]
        return AdapterRef(name, 1, adapter.digest, adapter.virtual_tokens)

    def submit(
        self,
        prompt: Sequence[int],
        *choices: SamplingParams,
        adapter: str | AdapterRef | None = None,
        tenant: str = DEFAULT_TENANT,
        priority: Priority = Priority.NORMAL,
        timeout_s: float | None = None,
    ) -> str:
        self._ids += 1
        request_id, now = f"r{self._ids}", time.monotonic()
        self._outputs[request_id] = [Output() for _ in choices]
        self.engine.loop.submit(
            GenerationRequest(
                request_id,
                TenantId(tenant),
                tuple(prompt),
                tuple(choices),
                self.ref(adapter) if isinstance(adapter, str) else adapter,
                now,
                priority,
                deadline=None if timeout_s is None else now + timeout_s,
            )
        )
        return request_id

    def wait(self, *request_ids: str, timeout: float = 300.0) -> list[list[Output]]:
        """Outputs of the requests, once each has ended."""
        deadline = time.monotonic() + timeout
        while not all(self._done(r) for r in request_ids):
            for delta in self._mail.get(timeout=max(0.01, deadline - time.monotonic())):
                outputs = self._outputs.get(delta.request_id)
                if outputs is not None:
                    outputs[delta.index].add(delta)
        return [self._outputs.pop(r) for r in request_ids]

    def next_delta(self, request_id: str, timeout: float = 60.0) -> None:
        """Waits until something came for the request."""
        while not any(o.token_ids or o.error for o in self._outputs[request_id]):
            for delta in self._mail.get(timeout=timeout):
                if delta.request_id in self._outputs:
                    self._outputs[delta.request_id][delta.index].add(delta)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams],
        adapters: Sequence[str | AdapterRef | None] | None = None,
    ) -> list[Output]:
        """One output a prompt, all submitted at once."""
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        names = adapters or [None] * len(prompts)
        with self.together():
            ids = [
                self.submit(p, s, adapter=a) for p, s, a in zip(prompts, each, names, strict=True)
            ]
        return [outputs[0] for outputs in self.wait(*ids)]

    def metrics_value(self, name: str, **labels: str) -> float:
        """One sample of the metrics, 0 where it does not exist yet."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def together(self) -> Together:
        """Holds the step thread between two steps, so that what is submitted meanwhile starts
        together.
        """
        return Together(self.engine.loop)

    def _done(self, request_id: str) -> bool:
        outputs = self._outputs[request_id]
        return any(o.error for o in outputs) or all(o.finish_reason for o in outputs)


class Together:
    """See ``LocalEngine.together``."""

    def __init__(self, loop: Any) -> None:
        self._go = threading.Event()
        self._loop = loop

    def __enter__(self) -> None:
        self._loop._mailbox.post(self._go.wait)

    def __exit__(self, *_: object) -> None:
        self._go.set()


def base_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str = "base"
) -> BaseModel:
    """A model in memory as the engine takes it. Its attention is changed: give a copy."""
    return wrap_base(
        model,
        tokenizer,
        name=name,
        digest=f"digest-of-{name}",
        dtype=next(model.parameters()).dtype,
    )


def assert_at_rest(engine: LocalEngine) -> None:
    """Nothing runs, waits, or holds a block or a lease."""
    stats = engine.engine.client.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
    assert (stats.background_running, stats.background_waiting) == (0, 0)
    assert [r for r in stats.resident if r.leases] == []
