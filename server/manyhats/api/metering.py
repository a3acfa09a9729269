"""Around a generation: its tenant's quotas before, what it used after."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from manyhats.api.noting import noting
from manyhats.api.outputs import outputs
from manyhats.api.prompts import Job
from manyhats.api.state import ApiState
from manyhats.errors import ManyhatsError, PermissionDeniedError, QuotaExceededError, RequestError
from manyhats.tenancy.quota import Refusal
from manyhats.types import OutputDelta


async def metered(state: ApiState, job: Job) -> AsyncGenerator[tuple[int, OutputDelta]]:
    """The job's deltas, as ``outputs`` gives them, within what its tenant may have.

    Quotas of tokens pay for what is computed, each lane of an ensemble; usage counts as the answer
    does, once.

    Nothing is taken before the first delta is asked for, and whatever is not used comes back at the
    end, however that comes about; the prompt is paid for unless the engine refused it. Raises
    QuotaExceededError (with when to come back), RequestError or PermissionDeniedError (a request
    that can never pass), and what ``outputs`` raises.
    """
    tenant, limiter = job.tenant, state.limiter
    quotas = state.tenants.quotas(tenant)
    reserved = job.lanes * (job.prompt_tokens + job.most_output_tokens)
    try:
        refusal = await limiter.admit(tenant, job.id, quotas, reserved)
    except BaseException:
        # Cancelled, and nobody knows whether it was taken: give up the place, not the tokens.
        await limiter.settle(tenant, job.id, quotas, 0)
        raise
    if refusal is not None:
        state.metrics.refused(tenant, refusal.quota)
        raise _refused(refusal)
    noted = noting(job)
    begun, paid, generated = False, True, 0
    try:
        async with aclosing(outputs(state.engine, job)) as events:
            async for index, delta in events:
                if not begun:
                    begun = True
                    await limiter.start(tenant, job.id)
                generated += len(delta.token_ids)
                noted(index, delta)
                yield index, delta
    except ManyhatsError:
        paid = begun
        raise
    finally:
        used = job.lanes * (job.prompt_tokens + generated) if paid else 0
        await limiter.settle(tenant, job.id, quotas, max(0, reserved - used))
        if paid:
            adapter = None if job.adapter is None else job.adapter.name
            state.usage.add(tenant, adapter, job.prompt_tokens, generated)
            state.recent.note(job.adapter)
            state.metrics.used(tenant, job.prompt_tokens, generated)


def _refused(refusal: Refusal) -> ManyhatsError:
    name, limit = refusal.quota, refusal.limit
    if limit == 0:
        return PermissionDeniedError(f"{name}: this tenant's quota is 0", param=name)
    if refusal.retry_after_s is None:
        return RequestError(
            f"{name}: the prompt and max_tokens come to {refusal.wanted} tokens, over this "
            f"tenant's quota of {limit}, whenever they come",
            param="max_tokens",
        )
    return QuotaExceededError(
        f"{name}: this tenant's quota of {limit} is used up; the request asks for "
        f"{refusal.wanted} more",
        param=name,
        retry_after_s=refusal.retry_after_s,
    )
