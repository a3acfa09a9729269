"""Keeping the snapshot of a shared registry fresh: woken by whoever writes, and by a poll."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from manyhats.errors import ServiceError
from manyhats.lifecycle.registry import Registry

logger = logging.getLogger(__name__)

POLL_S: Final = 0.5
"""How often it is looked whatever is heard, and tried again while the store is away."""


class Follower:
    """Follows ``registry`` while ``following`` runs; ``reachable`` says whether its store answers.
    ``changed`` is called when it has changed.

    While it does not, the last snapshot goes on answering. Both turns are logged, once.
    """

    def __init__(self, registry: Registry, changed: Callable[[], None] = lambda: None) -> None:
        self._registry = registry
        self._changed = changed
        self._reachable = True

    @property
    def reachable(self) -> bool:
        """Whether the store answered when it was last asked; always, where it is no shared one."""
        return self._reachable

    @contextmanager
    def following(self) -> Iterator[None]:
        """Refreshes on a thread of its own until the block ends; nothing to do for a file."""
        if not self._registry.store.shared:
            yield
            return
        ended = threading.Event()
        thread = threading.Thread(target=self._run, args=(ended,), name="registry", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _run(self, ended: threading.Event) -> None:
        told = self._registry.revision
        while not ended.is_set():
            try:
                self._registry.store.wait(POLL_S)
                self._registry.refresh()
                if self._registry.revision != told:
                    told = self._registry.revision
                    self._changed()
            except ServiceError as error:
                self._note(error)
                ended.wait(POLL_S)
            else:
                self._note(None)

    def _note(self, error: ServiceError | None) -> None:
        if error is not None and self._reachable:
            logger.error("the adapters are those known last: %s", error.message)
        elif error is None and not self._reachable:
            logger.info("the shared registry answers again")
        self._reachable = error is None
