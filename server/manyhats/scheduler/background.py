"""Background sequences: evaluations, probes and comparisons beside live traffic.

The rules, which ``Scheduler`` keeps:

- they wait in a queue of their own with a bound of its own, first come, first served, and are
  neither counted nor charged to any tenant;
- one is admitted only while no live sequence waits;
- beside live sequences they compute ``background_tokens`` tokens a step together, out of what the
  live ones leave of the step's budget; alone they have all of it;
- whenever a live sequence lacks a place in the step, cache blocks or its adapter, background ones
  are preempted before any other, the one admitted last first, for the adapter's sake those that
  hold a lease. They wait at the front of their queue and keep the tokens they have generated;
- one that waits for its adapter stops waiting for it as soon as a live sequence waits, so that no
  slot is kept free for it;
- one of an ensemble computes a token in all its lanes or in none, so beside live ones it gets on
  where ``background_tokens`` are at least its lanes.

So they delay a live sequence by at most one step, and once nobody else is there they get on.
"""

from __future__ import annotations

from collections import deque

from manyhats.errors import ManyhatsError
from manyhats.scheduler.holdings import Holdings
from manyhats.scheduler.plan import StepPlan
from manyhats.scheduler.residency import Failed, Ready
from manyhats.scheduler.running import Running
from manyhats.types import Sequence


class BackgroundQueue:
    """The background sequences that wait. Confined to the step loop's thread."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings
        self._seqs: deque[Sequence] = deque()
        self._asked: Sequence | None = None  # waits for its adapter, known to the residency

    def __len__(self) -> int:
        return len(self._seqs)

    def push(self, seq: Sequence) -> None:
        """Queue a new sequence."""
        self._seqs.append(seq)

    def push_front(self, seq: Sequence) -> None:
        """Queue a preempted sequence before all others."""
        self.withdraw()
        self._seqs.appendleft(seq)

    def head(self) -> Sequence | None:
        """The one to be served next."""
        return self._seqs[0] if self._seqs else None

    def pop(self) -> Sequence:
        """Take the head out. Raises IndexError where nobody waits."""
        seq = self._seqs.popleft()
        if self._asked is seq:
            self._asked = None
        return seq

    def remove(self, seq: Sequence) -> None:
        """Take a waiting sequence out. Raises ValueError if it does not wait."""
        self._seqs.remove(seq)
        if self._asked is seq:
            self._asked = None

    def withdraw(self) -> None:
        """Nobody here waits for an adapter any longer; the head will ask again."""
        if self._asked is not None:
            self._holdings.cancel(self._asked)
            self._asked = None

    def admit(
        self, plan: StepPlan, running: Running, max_num_seqs: int
    ) -> tuple[Sequence, ManyhatsError] | None:
        """Admit while there is room. Returns the head once its adapter fails, out of the queue."""
        while plan.left:
            seq = self.head()
            if seq is None or running.places + len(seq.computed) > max_num_seqs:
                return None
            if not self._holdings.take_blocks(seq, alone=not running):
                return None
            answer = self._holdings.prepare(seq)
            if isinstance(answer, Ready):
                answer = self._holdings.lease(seq)
            if isinstance(answer, Ready):
                running.enter(self.pop())
                plan.chunk(seq)
                continue
            self._holdings.cancel_blocks(seq)
            if isinstance(answer, Failed):
                return self.pop(), answer.error
            self._asked = seq
            return None
        return None
