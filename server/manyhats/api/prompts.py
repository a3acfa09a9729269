"""From a validated body to ``GenerationRequest``s: resolve the model, tokenize, fit into the
context.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import anyio.to_thread

from manyhats.api import sampling
from manyhats.api.fields import Prompt
from manyhats.api.schemas import ChatRequest, CompletionRequest, SamplingFields
from manyhats.api.state import ApiState
from manyhats.engine.interface import ChatTemplateError, Tokenizer
from manyhats.errors import ContextLengthError, RequestError
from manyhats.lifecycle.compositions import resolve_composition
from manyhats.lifecycle.routes import RouteHint
from manyhats.types import AdapterRef, GenerationRequest, SamplingParams, TenantId

INLINE_CHARS = 4096
"""Text up to this long is tokenized on the event loop; a longer one on a worker thread."""
COMPLETION_MAX_TOKENS = 16
"""``max_tokens`` of a completion that names none, as OpenAI has it."""
BASELINE = "baseline"
"""What ``x-manyhats-served-by`` says of the bare base."""


@dataclass(frozen=True, slots=True)
class Job:
    """One HTTP request's generation: the engine's requests (one a prompt) and what the answer
    repeats.

    ``n``: choices of each prompt; choice ``j`` of prompt ``i`` has the index ``i * n + j``.
    ``echo`` holds each prompt's text where it is to be repeated. ``scoring``: only the prompt is
    wanted, nothing generated.
    """

    id: str
    created: int
    model: str
    fingerprint: str
    adapter: AdapterRef | None
    requests: tuple[GenerationRequest, ...]
    n: int
    include_usage: bool
    echo: tuple[str, ...] | None = None
    scoring: bool = False

    @property
    def tenant(self) -> TenantId:
        """Who pays."""
        return self.requests[0].tenant

    @property
    def lanes(self) -> int:
        """How often the model computes each token: once, or once a member of an ensemble."""
        return 1 if self.adapter is None else len(self.adapter.lanes)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each once however many choices it has."""
        return sum(len(request.prompt_token_ids) for request in self.requests)

    @property
    def most_output_tokens(self) -> int:
        """Tokens that all choices may come to together."""
        return sum(p.max_tokens for request in self.requests for p in request.params)

    @property
    def served_by(self) -> str:
        """``name@version``, a composition's members, or ``baseline`` for the bare base."""
        return BASELINE if self.adapter is None else str(self.adapter)


async def plan_completion(
    state: ApiState, body: CompletionRequest, tenant: TenantId, hint: RouteHint | None = None
) -> Job:
    """The job of a completions request. Raises RequestError and its kin, naming field and bound."""
    bounds = sampling.Bounds(state.settings, state.engine.model)
    adapter = _worn(state, body, tenant, hint)
    sampling.check(body, bounds)
    if body.max_tokens == 0 and not body.echo:
        raise RequestError("max_tokens is 0: at least 1, unless echo is true", param="max_tokens")
    n = body.n or 1
    if len(body.prompt) * n > state.settings.max_queue:
        raise RequestError(
            f"prompt: {len(body.prompt)} prompts with n {n} are over the queue's bound of "
            f"{state.settings.max_queue}",
            param="prompt",
        )
    tokenizer = state.engine.tokenizer
    encoded = [await _encode_prompt(tokenizer, prompt, bounds) for prompt in body.prompt]
    scoring = body.max_tokens == 0
    if body.echo and body.logprobs is not None and adapter is not None and len(adapter.lanes) > 1:
        raise RequestError(
            "echo: log-probabilities of the prompt are not served for an ensemble; leave out echo "
            "or logprobs",
            param="echo",
        )
    params = []
    for tokens in encoded:
        wanted = 1 if scoring else body.max_tokens
        room = fit(
            len(tokens),
            wanted,
            _default(state, tenant, wanted, COMPLETION_MAX_TOKENS, "max_tokens"),
            _context(bounds, adapter),
            "prompt",
            "max_tokens",
        )
        one = sampling.completion_params(body, room, bounds)
        params.append(sampling.choices(one, body.seed, n))
    echo = tuple(_text(tokenizer, prompt) for prompt in body.prompt) if body.echo else None
    return _job(state, "cmpl", body, tenant, adapter, encoded, params, echo=echo, scoring=scoring)


async def plan_chat(
    state: ApiState, body: ChatRequest, tenant: TenantId, hint: RouteHint | None = None
) -> Job:
    """The job of a chat request. Raises RequestError and its kin, naming field and bound."""
    bounds = sampling.Bounds(state.settings, state.engine.model)
    adapter = _worn(state, body, tenant, hint)
    sampling.check(body, bounds)
    field, wanted = _chat_max_tokens(body)
    tokens = await _encode_chat(state.engine.tokenizer, body)
    room = fit(
        len(tokens),
        wanted,
        _default(state, tenant, wanted, state.settings.default_max_tokens, field),
        _context(bounds, adapter),
        "messages",
        field,
    )
    params = sampling.chat_params(body, room, bounds)
    if params.grammar is not None:
        await anyio.to_thread.run_sync(state.grammar.check, params.grammar)
    chosen = sampling.choices(params, body.seed, body.n or 1)
    return _job(state, "chatcmpl", body, tenant, adapter, [tokens], [chosen])


def _worn(
    state: ApiState, body: SamplingFields, tenant: TenantId, hint: RouteHint | None
) -> AdapterRef | None:
    """The version or the composition that the request is to wear; None for the bare base."""
    adapter = state.adapters.resolve(body.model, tenant, hint)
    if body.adapter is None:
        return adapter
    if adapter is not None:
        raise RequestError(
            f"adapter is given, so model must be the base's id, {state.engine.model.id!r}",
            param="model",
        )
    resolve = partial(state.adapters.resolve, tenant=tenant, hint=hint)
    return resolve_composition(body.adapter, resolve, "adapter")


def _context(bounds: sampling.Bounds, adapter: AdapterRef | None) -> int:
    """Tokens of the context that are left for prompt and answer by the adapter's virtual ones."""
    return bounds.model.context_len - (adapter.virtual_tokens if adapter is not None else 0)


def _default(state: ApiState, tenant: TenantId, wanted: int | None, usual: int, field: str) -> int:
    """``max_tokens`` where none is given. Raises RequestError where it is over the quota."""
    quota = state.tenants.quotas(tenant).max_tokens
    if quota is None:
        return usual
    if wanted is not None and wanted > quota:
        raise RequestError(
            f"{field} is {wanted}: this tenant's quota of max_tokens is {quota}", param=field
        )
    return min(usual, quota)


def fit(
    prompt_tokens: int,
    wanted: int | None,
    default: int,
    context: int,
    prompt_field: str,
    field: str,
) -> int:
    """``max_tokens`` of a prompt: ``wanted``, or where that is None the lesser of ``default`` and
    the room left.

    Raises ContextLengthError, naming both numbers, where the prompt leaves no room or ``wanted`` is
    over it.
    """
    room = context - prompt_tokens
    if room < 1:
        raise ContextLengthError(
            f"{prompt_field}: the prompt has {prompt_tokens} tokens, the context is {context} and "
            f"one token at least is to be generated: the bound of the prompt is {context - 1}",
            param=prompt_field,
        )
    if wanted is None:
        return min(default, room)
    if wanted > room:
        raise ContextLengthError(
            f"{field} is {wanted} and the prompt has {prompt_tokens} tokens, over the context of "
            f"{context}: the bound of {field} here is {room}",
            param=field,
        )
    return wanted


def _chat_max_tokens(body: ChatRequest) -> tuple[str, int | None]:
    """The field that bounds the answer and its value."""
    if body.max_completion_tokens is None:
        if body.max_tokens == 0:
            raise RequestError("max_tokens is 0: at least 1", param="max_tokens")
        return "max_tokens", body.max_tokens
    if body.max_tokens not in (None, body.max_completion_tokens):
        raise RequestError(
            f"max_tokens is {body.max_tokens} and max_completion_tokens "
            f"{body.max_completion_tokens}: give one",
            param="max_completion_tokens",
        )
    return "max_completion_tokens", body.max_completion_tokens


async def _encode_prompt(
    tokenizer: Tokenizer, prompt: Prompt, bounds: sampling.Bounds
) -> tuple[int, ...]:
    if not isinstance(prompt, str):
        if prompt and (max(prompt) >= bounds.model.vocab_size or min(prompt) < 0):
            for token in prompt:
                bounds.token_id("prompt", token)
        tokens = prompt
    elif len(prompt) <= INLINE_CHARS:
        tokens = tuple(tokenizer.encode(prompt))
    else:
        tokens = tuple(await anyio.to_thread.run_sync(tokenizer.encode, prompt))
    if not tokens:
        raise RequestError("prompt is empty: at least one token is needed", param="prompt")
    return tokens


async def _encode_chat(tokenizer: Tokenizer, body: ChatRequest) -> tuple[int, ...]:
    messages = [{"role": m.role, "content": m.content} for m in body.messages]
    work = partial(_render_and_encode, tokenizer, messages)
    long = sum(len(m.content) for m in body.messages) > INLINE_CHARS
    try:
        return await anyio.to_thread.run_sync(work) if long else work()
    except ChatTemplateError as error:
        raise RequestError(f"messages: {error}", param="messages") from error


def _render_and_encode(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]
) -> tuple[int, ...]:
    # the template has written its own special tokens
    tokens = tuple(tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False))
    if not tokens:
        raise RequestError(
            "messages: the chat template made an empty prompt of them", param="messages"
        )
    return tokens


def _text(tokenizer: Tokenizer, prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return tokenizer.decode(prompt, skip_special_tokens=False)


def _job(
    state: ApiState,
    prefix: str,
    body: SamplingFields,
    tenant: TenantId,
    adapter: AdapterRef | None,
    prompts: Sequence[tuple[int, ...]],
    params: Sequence[tuple[SamplingParams, ...]],
    *,
    echo: tuple[str, ...] | None = None,
    scoring: bool = False,
) -> Job:
    job_id = f"{prefix}-{uuid.uuid4().hex}"
    arrival = time.monotonic()
    requests = tuple(
        GenerationRequest(
            request_id=job_id if len(prompts) == 1 else f"{job_id}-{i}",
            tenant=tenant,
            prompt_token_ids=tokens,
            params=chosen,
            adapter=adapter,
            arrival=arrival,
        )
        for i, (tokens, chosen) in enumerate(zip(prompts, params, strict=True))
    )
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return Job(
        id=job_id,
        created=int(time.time()),
        model=body.model,
        fingerprint=f"fp_{state.engine.model.digest[:12]}",
        adapter=adapter,
        requests=requests,
        n=body.n or 1,
        include_usage=usage,
        echo=echo,
        scoring=scoring,
    )
