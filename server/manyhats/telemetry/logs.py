"""How log lines look, and which are written.

As JSON each line is one object: ``time`` (RFC 3339, UTC), ``level``, ``logger``, ``message``; in a
request also ``request_id``, and ``trace_id`` and ``span_id`` where its caller or we trace it; then
the line's own fields; ``exception`` with the traceback. The standard library's logging carries
them; a formatter of forty lines is less than a dependency on one.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any, Final

from manyhats.config import LogFormat, LogLevel
from manyhats.telemetry.record import RequestRecord, current

FIELDS: Final = "manyhats_fields"
"""The ``extra`` of a log call whose mapping becomes fields of the line."""
OURS: Final = ("manyhats", "manyhats_kernels")
_TEXT: Final = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
_QUIET: Final = ("httpx", "httpcore")
_access = logging.getLogger("manyhats.access")

# Asked every few seconds by machines: their lines would hide the others.
_PROBES: Final = frozenset({"/healthz", "/readyz", "/startupz", "/health", "/metrics"})


def set_up(level: LogLevel, form: LogFormat) -> None:
    """Sends every line of this process to stderr in the given form."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form is LogFormat.JSON else TextFormatter(_TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    set_level(level)


def set_level(level: LogLevel) -> None:
    """The least level that is written, from now on, in every thread.

    ``debug`` opens our own loggers alone: what libraries say at that level may hold what callers
    sent.
    """
    number = logging.getLevelNamesMapping()[level.value.upper()]
    for name in OURS:
        logging.getLogger(name).setLevel(number)
    logging.getLogger().setLevel(max(number, logging.INFO))


def get_level() -> LogLevel:
    """The level that is in force."""
    number = logging.getLogger(OURS[0]).getEffectiveLevel()
    return LogLevel(logging.getLevelName(number).lower())


class TextFormatter(logging.Formatter):
    """Lines for people; ``[request_id]`` behind those that belong to a request."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback below it."""
        text = super().format(record)
        request = current()
        if request is None:
            return text
        line, _, rest = text.partition("\n")
        return "\n".join(filter(None, (f"{line} [{request.id}]", rest)))


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The module's docstring has the fields."""
        when = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request = current()
        if request is not None:
            line |= _identity(request)
        line |= getattr(record, FIELDS, None) or {}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        text = json.dumps(line, default=str, ensure_ascii=False)
        return text.encode("utf-8", "replace").decode()  # a lone surrogate must not cost the line


def access(request: RequestRecord) -> None:
    """The line of a request that has ended."""
    level = logging.DEBUG if request.route in _PROBES else logging.INFO
    if not _access.isEnabledFor(level):
        return
    fields: dict[str, Any] = {
        "method": request.method,
        "route": request.route,
        "status": request.status,
        "duration_ms": round(1000 * request.duration_s, 3),
    }
    if request.tenant is not None:
        fields["tenant"] = request.tenant
    if request.adapter is not None:
        fields |= {
            "adapter": request.adapter,
            "prompt_tokens": request.prompt_tokens,
            "output_tokens": request.output_tokens,
        }
    shown = " ".join(f"{name}={value}" for name, value in list(fields.items())[3:])
    message = f"{request.method} {request.route} {request.status} {shown}"
    _access.log(level, "%s", message, extra={FIELDS: fields})


def _identity(request: RequestRecord) -> dict[str, str]:
    shown = {"request_id": request.id}
    if request.trace is not None:
        shown |= {"trace_id": request.trace.trace_id, "span_id": request.trace.span_id}
    return shown
