"""Operations: startup, liveness, readiness, metrics, version. Health alone asks for no key."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

import manyhats
from manyhats.api.state import ApiState, api_state

router = APIRouter(tags=["operations"])


@router.get("/startupz")
async def startupz(request: Request) -> JSONResponse:
    """Startup: 200 from the base's first answer on, whatever comes later."""
    state = api_state(request)
    if state.readiness.proven:
        return JSONResponse({"started": True, "reason": None})
    reason = state.readiness.reason(state.engine)
    return JSONResponse({"started": False, "reason": reason}, status_code=503)


@router.get("/healthz")
async def healthz(request: Request) -> JSONResponse:
    """Liveness: the process answers and its step loop has not ended by a defect (503: start anew).

    A server that drains, or whose store is away, lives.
    """
    if api_state(request).engine.failed:
        return JSONResponse({"status": "the step loop has ended by a defect"}, status_code=503)
    return JSONResponse({"status": "ok"})


@router.get("/readyz")
async def readyz(request: Request) -> JSONResponse:
    """Readiness, and what is served and how; 503 with the reason while no traffic should come.

    While the shared ``store`` is unreachable requests are served as before, and changes refused.
    """
    state = api_state(request)
    body = _described(state)
    return JSONResponse(body, status_code=200 if body["ready"] else 503)


@router.get("/health")
async def health(request: Request) -> Response:
    """Readiness with an empty body, as vLLM's route of this name."""
    state = api_state(request)
    return Response(status_code=200 if state.readiness.reason(state.engine) is None else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Every series in Prometheus' text format; with exemplars where OpenMetrics is accepted."""
    accept = request.headers.get("accept", "")
    text, content_type = api_state(request).metrics.render(accept)
    return Response(text, headers={"content-type": content_type})


@router.get("/version")
async def version() -> dict[str, str]:
    """The server's version."""
    return {"version": manyhats.__version__}


def _described(state: ApiState) -> dict[str, object]:
    model = state.engine.model
    stats = state.engine.stats()
    reason = state.readiness.reason(state.engine)
    return {
        "ready": reason is None,
        "reason": reason,
        "store": "reachable" if state.store_reachable() else "unreachable",
        "model": model.id,
        "base_digest": model.digest,
        "quantization": model.quantization,
        "dtype": model.dtype,
        "device": model.device,
        "context_len": model.context_len,
        "kernels": {"backend": model.kernel_backend, "reason": model.kernel_reason},
        "slots": {"total": stats.slots_total, "used": len(stats.resident)},
        "running": stats.running,
        "waiting": stats.waiting,
    }
