"""Logits of live answers, kept as they are drawn for a comparison that is to come.

What a version says of its own answer is known while it gives it: kept, it need not be computed
again. An answer belongs to whoever holds it, and its rows come back to the budget with its end; one
that the budget has no room for is given up, and a comparison then scores it anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from manyhats.engine.compare import LaneProbe
from manyhats.types import AdapterRef


class RowBudget:
    """At most ``rows`` rows at a time, of all answers together. Thread-safe, without a lock: rows
    come back wherever an answer's last holder lets go of it, inside a collection of garbage too.
    """

    def __init__(self, rows: int) -> None:
        self._left = deque([None] * rows)

    def __len__(self) -> int:
        """Rows that are left."""
        return len(self._left)

    def take(self) -> bool:
        """A row, if there is one."""
        try:
            self._left.pop()
        except IndexError:
            return False
        return True

    def give(self, rows: int) -> None:
        """Rows that are held no longer."""
        self._left.extend([None] * rows)


class KeptAnswer:
    """One answer's rows so far. Filled on the step thread; read by anybody once it has ended."""

    def __init__(self, adapter: AdapterRef | None, budget: RowBudget) -> None:
        self._adapter = adapter
        self._budget = budget
        self._tokens: list[int] = []
        self._rows: LaneProbe | None = LaneProbe(adapter, (), keep=True)

    def __del__(self) -> None:
        self._budget.give(len(self._tokens))

    def __len__(self) -> int:
        """Tokens that have a row."""
        return len(self._tokens)

    def drawn(self, logits: torch.Tensor, token: int) -> None:
        """The next token and the raw logits that it was drawn from, [1, V]; they are copied."""
        if self._rows is None:
            return
        if not self._budget.take():
            self._rows = None
            self._budget.give(len(self._tokens))
            self._tokens.clear()
            return
        self._tokens.append(token)
        self._rows.drawn(logits, token)

    def lane(self, adapter: AdapterRef | None, answer: Sequence[int]) -> LaneProbe | None:
        """The answer as a comparison's first lane; None where it is not whole, or is another's."""
        if self._adapter != adapter or self._tokens != list(answer):
            return None
        return self._rows
