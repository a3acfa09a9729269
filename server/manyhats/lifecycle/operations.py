"""Registrations that take a while: fetched on threads of their own, and watched meanwhile.

They are this server's, in memory: a restart forgets them, and keeps what was fetched, so that the
same registration goes on from there.
"""

from __future__ import annotations

import enum
import hashlib
import logging
import secrets
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from manyhats.adapters.sources.address import Source
from manyhats.adapters.sources.fetch import Fetcher
from manyhats.adapters.sources.progress import CancelledFetchError, Progress
from manyhats.errors import ManyhatsError, NotFoundError, QueueFullError, ServiceError
from manyhats.lifecycle.directory import AdapterCard
from manyhats.lifecycle.records import Registration
from manyhats.lifecycle.service import AdapterService
from manyhats.types import TenantId

logger = logging.getLogger(__name__)

MAX_OPEN: Final = 64
"""Operations that may wait or run."""
_REMEMBERED: Final = 256
_KEPT_S: Final = 7 * 86_400
_RETRY_S: Final = 5.0


class OperationState(enum.StrEnum):
    """Where an operation is in its life; the last three are its ends."""

    QUEUED = "queued"
    FETCHING = "fetching"
    CHECKING = "checking"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(slots=True, eq=False)
class Operation:
    """One registration from elsewhere. ``card`` or ``error`` is set when ``done`` is."""

    id: str
    tenant: TenantId
    name: str
    source: Source
    created: float
    state: OperationState = OperationState.QUEUED
    progress: Progress = field(default_factory=Progress)
    card: AdapterCard | None = None
    error: ManyhatsError | None = None
    done: Future[None] = field(default_factory=Future)

    def shown(self) -> dict[str, Any]:
        """The operation as JSON."""
        error = self.error
        return {
            "id": self.id,
            "object": "operation",
            "name": self.name,
            "source": str(self.source),
            "created": int(self.created),
            "state": self.state.value,
            "bytes_done": self.progress.done,
            "bytes_total": self.progress.total,
            "adapter": None if self.card is None else str(self.card.ref),
            "error": error and {"message": error.message, "code": error.code, "param": error.param},
        }


class Operations:
    """The registrations from elsewhere of one server. Thread-safe; nothing here blocks but the
    making, which looks at the disk.

    ``folder`` keeps what was fetched of those that broke off; ``workers`` run at once.
    """

    def __init__(
        self,
        service: AdapterService,
        fetcher: Fetcher,
        folder: Path,
        *,
        workers: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._service = service
        self._fetcher = fetcher
        self._folder = folder
        self._clock = clock
        self._lock = threading.Lock()
        self._all: OrderedDict[str, Operation] = OrderedDict()
        self._open: dict[str, Operation] = {}  # by what they register from where
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="adapter-fetch")
        folder.mkdir(parents=True, exist_ok=True)
        self._forget_old_bytes()

    def close(self) -> None:
        """End what runs at its next bytes, and wait for it."""
        with self._lock:
            running = list(self._open.values())
        for operation in running:
            operation.progress.cancel()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def start(
        self, name: str, source: Source, *, tenant: TenantId, registration: Registration
    ) -> Operation:
        """Register what ``source`` holds; the operation that is at it already, where there is one.

        Raises RequestError (the name), AdapterRejectedError (``bad_source``,
        ``source_not_allowed``), ConflictError, QueueFullError (too many are open).
        """
        self._service.check(name)
        self._fetcher.allow.check(source)
        told = f"{tenant}\0{name}\0{source!r}"
        key = hashlib.sha256(told.encode()).hexdigest()[:32]
        with self._lock:
            running = self._open.get(key)
            if running is not None:
                return running
            if len(self._open) >= MAX_OPEN:
                raise QueueFullError(
                    f"{len(self._open)} registrations are being fetched, of at most {MAX_OPEN}",
                    retry_after_s=_RETRY_S,
                )
            ident = f"op-{secrets.token_hex(8)}"
            operation = Operation(ident, tenant, name, source, self._clock())
            self._open[key] = self._all[ident] = operation
            self._forget_old()
        self._threads.submit(self._run, key, operation, registration)
        return operation

    def get(self, ident: str, tenant: TenantId) -> Operation:
        """One operation of the tenant's. Raises NotFoundError."""
        with self._lock:
            found = self._all.get(ident)
        if found is None or found.tenant != tenant:
            raise NotFoundError(f"no operation {ident[:80]!r}", param="id")
        return found

    def list(self, tenant: TenantId) -> list[Operation]:
        """The tenant's operations, those that have ended included, oldest first."""
        with self._lock:
            return [operation for operation in self._all.values() if operation.tenant == tenant]

    def cancel(self, ident: str, tenant: TenantId) -> Operation:
        """End an operation at its next bytes, unless it has ended. Raises NotFoundError."""
        operation = self.get(ident, tenant)
        operation.progress.cancel()
        return operation

    def _run(self, key: str, operation: Operation, registration: Registration) -> None:
        try:
            operation.card = self._register(key, operation, registration)
            operation.state = OperationState.SUCCEEDED
        except CancelledFetchError:
            operation.error = ServiceError("the registration was cancelled", param="source")
            operation.state = OperationState.CANCELLED
        except ManyhatsError as error:
            operation.error, operation.state = error, OperationState.FAILED
        except Exception:
            logger.exception("fetching %s failed", operation.source)
            operation.error = ManyhatsError("internal error; the server's log has it")
            operation.state = OperationState.FAILED
        finally:
            with self._lock:
                del self._open[key]
            operation.done.set_result(None)
        how = operation.error.message if operation.error else operation.state.value
        logger.info("%s: %s from %s: %s", operation.id, operation.name, operation.source, how)

    def _register(self, key: str, operation: Operation, registration: Registration) -> AdapterCard:
        folder = self._folder / key
        folder.mkdir(exist_ok=True)
        operation.progress.check()
        operation.state = OperationState.FETCHING
        try:
            config, weights = self._fetcher.fetch(operation.source, folder, operation.progress)
            operation.state = OperationState.CHECKING
            with self._service.stage() as staging:
                staging.copy(config, weights)
                card = self._service.register_staged(
                    operation.name,
                    staging,
                    tenant=operation.tenant,
                    source=str(operation.source),
                    registration=registration,
                )
        except (ServiceError, CancelledFetchError):
            raise  # it may go on from here
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
        return card

    def _forget_old(self) -> None:
        """Ended operations beyond those remembered."""
        ended = [i for i, o in self._all.items() if o.done.done()]
        for ident in ended[: max(0, len(self._all) - _REMEMBERED)]:
            del self._all[ident]

    def _forget_old_bytes(self) -> None:
        """Nobody has come back for these in a week."""
        for folder in self._folder.iterdir():
            if folder.stat().st_mtime < self._clock() - _KEPT_S:
                shutil.rmtree(folder, ignore_errors=True)
