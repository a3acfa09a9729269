"""How other threads reach the step thread: tasks, in order, run between two steps."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

Task = Callable[[], object]
"""Whatever a task returns is let go."""


class Mailbox:
    """A thread-safe queue of tasks with a wake-up."""

    def __init__(self) -> None:
        self._tasks: deque[Task] = deque()
        self._arrived = threading.Condition()

    def post(self, task: Task) -> None:
        """Leaves a task for the step thread."""
        with self._arrived:
            self._tasks.append(task)
            self._arrived.notify()

    def take(self, *, wait: bool, timeout_s: float | None = None) -> list[Task]:
        """All tasks so far; with ``wait``, blocks until there is at least one, or for
        ``timeout_s``.
        """
        if not wait and not self._tasks:  # the common case in a busy loop: no lock
            return []
        with self._arrived:
            if wait:
                self._arrived.wait_for(lambda: self._tasks, timeout_s)
            tasks = list(self._tasks)
            self._tasks.clear()
            return tasks
