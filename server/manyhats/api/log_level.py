"""The log's level, at run time. Needs the admin role."""

from __future__ import annotations

import logging
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import Field

from manyhats.api.auth import require_admin
from manyhats.api.body import read_body
from manyhats.api.schemas import StrictModel, request_body
from manyhats.config import LogLevel
from manyhats.telemetry import logs

router = APIRouter(tags=["operations"], dependencies=[Depends(require_admin)])
logger = logging.getLogger(__name__)


class LevelRequest(StrictModel):
    """Body of ``PUT /admin/log-level``."""

    level: Annotated[LogLevel, Field(strict=False)]


@router.get("/admin/log-level")
async def show_level() -> dict[str, str]:
    """The least level that is written."""
    return {"level": logs.get_level().value}


@router.put("/admin/log-level", openapi_extra=request_body(LevelRequest))
async def change_level(request: Request) -> dict[str, str]:
    """Write from this level on, until the next change or the end of the process.

    This server alone: others behind the same address have levels of their own.
    """
    body = await read_body(request, LevelRequest)
    before = logs.get_level()
    logs.set_level(body.level)
    logger.warning("the log's level is %s now, it was %s", body.level.value, before.value)
    return {"level": body.level.value}
