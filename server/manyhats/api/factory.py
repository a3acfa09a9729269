"""The FastAPI application around an ``ApiState``: routers, error handlers, middleware."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Final

from fastapi import APIRouter, Depends, FastAPI
from starlette.middleware import Middleware

import manyhats
from manyhats.api import log_level, openai, ops
from manyhats.api.auth import KeyRing, authorize
from manyhats.api.description import describe
from manyhats.api.handlers import install_handlers
from manyhats.api.limits import UPLOAD_SLACK, BodyLimitMiddleware
from manyhats.api.logprobs import TokenLabels
from manyhats.api.middleware import RequestContextMiddleware
from manyhats.api.state import ApiState

ALWAYS: Final = (openai.router, ops.router, log_level.router)
"""What every application serves: OpenAI's routes and operations."""


def create_api(
    state: ApiState,
    routers: Sequence[APIRouter] = (),
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None,
) -> FastAPI:
    """The application over ``state``: OpenAI's routes and operations, then ``routers`` (admin's,
    say); ``lifespan`` surrounds its running.

    Every route goes through ``authorize``, whoever wrote it. Also makes ``state.metrics`` name
    the kernels, and read the engine's snapshot, readiness and stores at every scrape. The
    documentation pages know no keys, so they are there only while no key is configured, or with
    ``docs_open``.
    """
    settings = state.settings
    open_docs = settings.docs_open or (KeyRing.of(settings).is_open and not state.tenants.has_keys)
    limits = Middleware(
        BodyLimitMiddleware,
        json_bytes=settings.max_body_kb << 10,
        upload_bytes=(settings.max_adapter_mb << 20) + UPLOAD_SLACK,
    )
    app = FastAPI(
        title="Manyhats",
        version=manyhats.__version__,
        lifespan=lifespan,
        openapi_url="/openapi.json" if open_docs else None,
        dependencies=[Depends(authorize)],
        middleware=[
            Middleware(RequestContextMiddleware, count=state.metrics.http, tracer=state.tracer),
            limits,
        ],
    )
    app.state.manyhats = state
    app.state.manyhats_labels = TokenLabels(state.engine.tokenizer)
    install_handlers(app)
    for router in (*ALWAYS, *routers):
        app.include_router(router)
    describe(app)
    state.metrics.kernels(state.engine.model.kernel_backend)
    state.metrics.watch(state.engine.stats)
    state.metrics.watch_server(
        manyhats.__version__,
        ready=lambda: state.readiness.reason(state.engine) is None,
        stores=lambda: {
            "registry": state.store_reachable(),
            "tenants": state.tenants.reachable,
            "quotas": state.limiter.reachable,
        },
    )
    return app
