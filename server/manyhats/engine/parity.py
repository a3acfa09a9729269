"""The parity probe: an adapter in the engine against what its parts mean, before it is registered.

A few fixed prompts go through the engine as any request does, so through the pool's layout and the
kernels, and through ``model.parts_reference``'s plain arithmetic around the same base modules,
which knows neither. Both see the same attention, cache and quantized weights, so what is compared
is the adapter. The engine's side is a request like others; the reference is one more short step
between two steps, since the base's modules have one user at a time.

The error is that of the logits less their mean over the vocabulary (a constant changes nothing),
relative to their root mean square: sqrt(mean (e - r)^2) / sqrt(mean r^2), and its maximum.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Final

import torch

from manyhats.adapters.parts import CompiledAdapter
from manyhats.engine.client import AsyncEngine
from manyhats.engine.loop import EngineLoop
from manyhats.engine.model.load import BaseModel
from manyhats.engine.model.parts_reference import wearing
from manyhats.engine.residency import AdapterResidency
from manyhats.engine.runner import ModelRunner
from manyhats.errors import AdapterRejectedError, EngineFailedError, ServiceError
from manyhats.scheduler.blocks import BlockManager
from manyhats.types import (
    AdapterRef,
    Digest,
    GenerationRequest,
    Priority,
    SamplingParams,
    Schedule,
    ScheduledSequence,
    Sequence,
    TenantId,
)

logger = logging.getLogger(__name__)

_TENANT: Final = TenantId("(parity)")
_LENGTHS: Final = (5, 11)
"""Tokens of each prompt."""

_TIMEOUT_S: Final = 120.0

BOUNDS: Final = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""The relative root mean square error that a dtype's rounding explains, with room; the largest
single error may be ten times that."""


@dataclass(frozen=True, slots=True)
class Parity:
    """How far the engine is from the reference, both relative; ``bound`` for the former."""

    rms_error: float
    max_error: float
    bound: float

    @property
    def agrees(self) -> bool:
        """Whether the engine computes what the parts mean. Undefined errors do not."""
        return self.rms_error <= self.bound and self.max_error <= 10 * self.bound


class Unregistered:
    """The disk tier's loader, and beside it adapters that are on no disk yet. Thread-safe."""

    def __init__(self, load: Callable[[Digest], CompiledAdapter]) -> None:
        self._load = load
        self._held: dict[Digest, CompiledAdapter] = {}

    def __call__(self, digest: Digest) -> CompiledAdapter:
        """The adapter of that digest. Raises what the disk tier raises."""
        held = self._held.get(digest)
        return held if held is not None else self._load(digest)

    @contextmanager
    def hold(self, adapter: CompiledAdapter) -> Iterator[None]:
        """The adapter can be loaded by its digest within the block."""
        self._held[adapter.digest] = adapter
        try:
            yield
        finally:
            del self._held[adapter.digest]


class _Kept:
    """Keeps the rows of one prompt, fp32."""

    def __init__(self) -> None:
        self.pieces: list[torch.Tensor] = []

    def rows(self, logits: torch.Tensor, _hidden: torch.Tensor | None) -> None:
        """See ``RowProbe``."""
        self.pieces.append(logits.float().cpu())


class ParityCheck:
    """The probe over one engine. Called on worker threads; blocks until the engine has answered."""

    def __init__(
        self,
        base: BaseModel,
        loop: EngineLoop,
        client: AsyncEngine,
        runner: ModelRunner,
        blocks: BlockManager,
        residency: AdapterResidency,
        unregistered: Unregistered,
    ) -> None:
        self._base = base
        self._loop = loop
        self._client = client
        self._runner = runner
        self._blocks = blocks
        self._residency = residency
        self._unregistered = unregistered
        self._prompts = _prompts(base.vocab_size)

    def check(self, ref: AdapterRef, adapter: CompiledAdapter) -> Parity | None:
        """Raises AdapterRejectedError where the engine disagrees with the adapter's parts.

        ``ref``: what the engine calls it meanwhile, with a digest that is nobody else's.
        None where nothing was compared: the engine does not run yet (adapters of the start), or
        the adapter has a prefix, whose only arithmetic is the copy. Raises ServiceError as well
        (no answer), and what the engine says of a request.
        """
        prefixed = any(parts.prefix is not None for parts in adapter.sites.values())
        if prefixed or not self._client.ready:
            return None
        started = time.monotonic()
        try:
            with self._unregistered.hold(replace(adapter, digest=ref.digest)):
                served = [self._served(ref, ids) for ids in self._prompts]
        except TimeoutError:
            raise ServiceError("the parity probe had no answer; try again later") from None
        except EngineFailedError as error:
            raise AdapterRejectedError(
                "parity_mismatch", f"the engine cannot compute with it: {error.message}"
            ) from None
        finally:
            self._residency.drop(ref)
        expected = [self._reference(adapter, ids) for ids in self._prompts]
        parity = _parity(torch.cat(served), torch.cat(expected), BOUNDS[self._base.dtype])
        logger.info(
            "parity of the adapter: rms error %.2e, largest %.2e, bound %.0e (%.2f s)",
            parity.rms_error,
            parity.max_error,
            parity.bound,
            time.monotonic() - started,
        )
        if not parity.agrees:
            raise AdapterRejectedError(
                "parity_mismatch",
                "the engine computes something else than the adapter's parts mean: relative error "
                f"of the logits {parity.rms_error:.3g} (at most {parity.bound:g}), the largest "
                f"{parity.max_error:.3g} (at most {10 * parity.bound:g})",
            )
        return parity

    def _served(self, ref: AdapterRef, ids: tuple[int, ...]) -> torch.Tensor:
        """The engine's logits of the prompt's tokens but the last: [tokens - 1, V]."""
        kept = _Kept()
        request = GenerationRequest(
            request_id=f"parity-{secrets.token_hex(16)}",
            tenant=_TENANT,
            prompt_token_ids=ids,
            params=(SamplingParams(max_tokens=0, seed=0, prompt_logprobs=0),),
            adapter=ref,
            arrival=time.monotonic(),
        )
        asyncio.run(asyncio.wait_for(self._client.probe(request, kept), _TIMEOUT_S))
        return torch.cat(kept.pieces)

    def _reference(self, adapter: CompiledAdapter, ids: tuple[int, ...]) -> torch.Tensor:
        """The same by the parts' own arithmetic."""
        worn = _on(self._base.device, adapter)
        work = self._loop.between_steps(lambda: self._step(worn, ids))
        try:
            return work.result(_TIMEOUT_S)
        except TimeoutError:
            raise ServiceError("the parity probe had no answer; try again later") from None

    def _step(self, adapter: CompiledAdapter, ids: tuple[int, ...]) -> torch.Tensor:
        """On the step thread: one forward pass over blocks that are given back at its end."""
        virtual = adapter.virtual_tokens
        sequence = Sequence(
            id=-1,
            request_id="parity",
            index=0,
            tenant=_TENANT,
            params=SamplingParams(max_tokens=0, seed=0, prompt_logprobs=0),
            adapter=None,
            arrival=0.0,
            prompt_len=virtual + len(ids),
            token_ids=[0] * virtual + list(ids),
            priority=Priority.BACKGROUND,
        )
        count = len(sequence.token_ids)
        if not self._blocks.allocate(sequence, count):
            raise ServiceError("the KV cache is full; try again later", retry_after_s=1.0)
        try:
            with wearing(self._base.module, self._base.spec, adapter), self._soft(adapter):
                made = self._runner.run(
                    Schedule((ScheduledSequence(sequence, 0, count, samples=True),)),
                    by_modules=True,  # a quicker way would not know what these wear
                )
            return made.prompts[0].logits[virtual:].float().cpu()
        finally:
            self._blocks.free(sequence)

    @contextmanager
    def _soft(self, adapter: CompiledAdapter) -> Iterator[None]:
        """The soft prompt in the place of the placeholders' embeddings."""
        soft = next(
            (p.soft_prompt for p in adapter.sites.values() if p.soft_prompt is not None), None
        )
        if soft is None:
            yield
            return

        def put(_module: Any, _args: Any, y: torch.Tensor) -> torch.Tensor:
            y = y.clone()
            y[..., : len(soft), :] = soft.to(y)
            return y

        embedding = self._base.module.get_input_embeddings()
        hook = embedding.register_forward_hook(put)
        try:
            yield
        finally:
            hook.remove()


def _parity(served: torch.Tensor, expected: torch.Tensor, bound: float) -> Parity:
    expected = expected - expected.mean(-1, keepdim=True)
    error = served - served.mean(-1, keepdim=True) - expected
    scale = expected.square().mean().sqrt()
    return Parity(
        float(error.square().mean().sqrt() / scale), float(error.abs().max() / scale), bound
    )


def _prompts(vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """Fixed ids, spread over the vocabulary."""
    draw = torch.Generator().manual_seed(20)
    return tuple(
        tuple(torch.randint(vocab_size, (length,), generator=draw).tolist()) for length in _LENGTHS
    )


def _on(device: torch.device, value: Any) -> Any:
    """The same with every tensor in it on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_on(device, item) for item in value)
    if isinstance(value, dict):
        return {key: _on(device, item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{f.name: _on(device, getattr(value, f.name)) for f in fields(value)}
        )
    return value
