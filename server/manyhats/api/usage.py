"""What tenants have used, as JSON and CSV: an operator's view of all of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from enum import StrEnum
from functools import partial
from typing import Annotated

import orjson
from fastapi import APIRouter, Depends, Query, Response

from manyhats.api.administration import blocking
from manyhats.api.auth import require_operator
from manyhats.api.state import ApiState, api_state
from manyhats.tenancy.usage import UsageRow

router = APIRouter(tags=["admin"], dependencies=[Depends(require_operator)])


class UsageFormat(StrEnum):
    """How the usage is written."""

    JSON = "json"
    CSV = "csv"


@router.get("/admin/usage")
async def usage(
    state: ApiState = Depends(api_state),  # noqa: B008 - FastAPI's way
    format: UsageFormat = UsageFormat.JSON,  # noqa: A002 - the query's name
    tenant: str | None = None,
    days: Annotated[int | None, Query(ge=1, le=3660)] = None,
) -> Response:
    """Requests and tokens of each tenant and adapter (null or empty: the bare base); of adapters of
    its own also seconds on a device, looked at every five, and the bytes that they take now.

    Of the last ``days`` (UTC, today is the first; default: all that are kept, from ``since`` on, in
    Unix seconds), of all replicas that share a store.
    """
    found = await blocking(partial(state.usage.rows, days))
    rows = [row for row in found if tenant is None or row.tenant == tenant]
    if format is UsageFormat.CSV:
        return Response(_csv(rows), media_type="text/csv; charset=utf-8")
    body = {"object": "list", "since": state.usage.since, "data": [asdict(row) for row in rows]}
    return Response(orjson.dumps(body), media_type="application/json")


def _csv(rows: Sequence[UsageRow]) -> str:
    """Names hold neither commas nor a formula's first character, so no spreadsheet computes."""
    text = io.StringIO()
    names = [field.name for field in fields(UsageRow)]
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()
