"""What each step computes: continuous batching with chunked prefill, preemption and adapter leases.

Pure policy: no tensor, no clock but the ``now`` that is passed in, one thread. A step is::

    schedule = scheduler.schedule(now)      # who, which tokens; blocks and leases are taken
    tokens = run(schedule)                  # elsewhere
    for item, token in ...:
        scheduler.complete(item, token, finished)

The order within a step: a token for every running sequence that decodes, then the next chunks of
running prefills in the order of admission, then new admissions, while the token budget lasts, then
background sequences by the rules of ``scheduler/background.py``. So prefill never starves decoding;
nor can decoding starve itself, as the budget is at least ``max_num_seqs`` tokens.

Blocks for all known tokens of a sequence are taken when it is admitted, so a prefill never runs out
of them half-way; only a decode that crosses into a new block can. Then the sequence admitted last
is preempted: it gives back its blocks *and its adapter lease*, and waits at the front of its
tenant's queue to be computed again. Keeping the lease would let a sequence that does not run hold
a slot, and hold up the draining that another one's adapter waits for. Whoever was admitted first
is preempted only by itself, for want of others, and ``add`` refuses what does not fit alone: so
somebody always gets on.

A choice of an ensemble is one sequence with several *lanes*, which are what is computed: each takes
a place among ``max_num_seqs``, blocks and a lease. It is admitted, preempted and ended with all of
them, and no lane computes its last known token before all do in the same step, as the token drawn
there is everybody's next.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC

from manyhats.errors import ManyhatsError, QueueFullError, RequestError
from manyhats.scheduler import completion
from manyhats.scheduler.background import BackgroundQueue
from manyhats.scheduler.blocks import BlockManager, SchedulerStateError
from manyhats.scheduler.budget import Budget
from manyhats.scheduler.fair import FairShares
from manyhats.scheduler.holdings import Holdings
from manyhats.scheduler.pace import AdmissionPace
from manyhats.scheduler.plan import StepPlan, decodes
from manyhats.scheduler.queue import Scan, WaitingQueue
from manyhats.scheduler.residency import Admission, Failed, Pending, Ready, Residency
from manyhats.scheduler.running import Running
from manyhats.types import (
    AdapterRef,
    Priority,
    Schedule,
    ScheduledSequence,
    Sequence,
    SequenceStatus,
)

_LOOKAHEAD = 8
"""How many adapters of sequences that cannot run yet each step asks for, to have them in time."""


class Scheduler:
    """Decides who runs, within the bounds that ``Budget`` explains and checks (ConfigError).

    ``fair`` shares between tenants; by default they are all alike.
    """

    def __init__(
        self,
        blocks: BlockManager,
        residency: Residency,
        *,
        max_num_seqs: int,
        max_step_tokens: int,
        max_queue: int,
        max_context: int,
        max_background: int = 64,
        background_tokens: int = 128,
        fair: FairShares | None = None,
    ) -> None:
        self._blocks = blocks
        self._holdings = Holdings(blocks, residency)
        self._budget = Budget(
            max_num_seqs,
            max_step_tokens,
            max_queue,
            max_context,
            max_background,
            background_tokens,
        )
        self._queue = WaitingQueue(fair)
        self._background = BackgroundQueue(self._holdings)
        self._running = Running(self._holdings)
        self._requests: dict[str, list[Sequence]] = {}  # unfinished sequences
        self._failed: list[tuple[Sequence, ManyhatsError]] = []
        self._first_admissions: list[Sequence] = []
        self._pending = False  # whether that step found a live sequence's adapter pending
        self._pace = AdmissionPace()

    # -- state

    @property
    def num_waiting(self) -> int:
        """Live sequences that wait, preempted ones included."""
        return len(self._queue)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks, background ones included."""
        return len(self._running)

    @property
    def num_background(self) -> tuple[int, int]:
        """Background sequences that wait, and those that run."""
        return len(self._background), self._running.num_background

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._requests)

    @property
    def first_admissions(self) -> SequenceABC[Sequence]:
        """The sequences that the latest ``schedule`` admitted for the first time."""
        return tuple(self._first_admissions)

    def waiting_adapters(self) -> tuple[AdapterRef, ...]:
        """The adapters that live sequences wait in, each once."""
        return self._queue.adapters()

    # -- coming and going

    def add(self, seq: Sequence) -> None:
        """Queue one sequence; see ``add_all``."""
        self.add_all((seq,))

    def add_all(self, seqs: SequenceABC[Sequence]) -> None:
        """Queue all choices of a request, or none. They are of one priority.

        Raises ContextLengthError where one can never fit the context or the cache, RequestError for
        an empty prompt or more choices than may ever wait, QueueFullError where the queue has no
        room for them now.
        """
        for seq in seqs:
            self._budget.check(seq, self._blocks)
        background = any(seq.background for seq in seqs)
        queue = self._background if background else self._queue
        bound = self._budget.max_background if background else self._budget.max_queue
        if len(seqs) > bound:
            raise RequestError(
                f"n is {len(seqs)}, and at most {bound} sequences may wait.", param="n"
            )
        if len(queue) + len(seqs) > bound:
            raise QueueFullError(
                f"{len(queue)} sequences are waiting, of at most {bound}.",
                retry_after_s=self._pace.retry_after_s(len(queue)),
            )
        for seq in seqs:
            self._requests.setdefault(seq.request_id, []).append(seq)
            queue.push(seq)

    def abort(self, request_id: str) -> list[Sequence]:
        """End the request's unfinished sequences, free all they hold, and return them (none: []).

        No item of theirs may be completed afterwards.
        """
        seqs = list(self._requests.get(request_id, ()))
        for seq in seqs:
            if seq.status is SequenceStatus.RUNNING:
                self._running.leave(seq)
            else:
                (self._background if seq.background else self._queue).remove(seq)
                self._holdings.cancel(seq)
            self._forget(seq)
        return seqs

    def take_failed(self) -> list[tuple[Sequence, ManyhatsError]]:
        """The sequences ended since the last call because their adapter cannot be had, and why."""
        failed, self._failed = self._failed, []
        return failed

    # -- a step

    def schedule(self, now: float) -> Schedule:
        """Choose the next step's work. Empty where nothing can run (all wait for adapters)."""
        plan = StepPlan(self._budget.max_step_tokens)
        self._first_admissions, self._pending = [], False
        self._schedule_running(Priority.NORMAL, plan)
        # Who was preempted would be the first to come back, for as long as nothing has changed.
        room = all(seq.background for seq in plan.preempted)
        self._admit(plan, room)
        if self._pending and self._yield_leases(plan):
            self._admit(plan, room)
        self._pace.note(now, len(self._first_admissions))
        self._schedule_background(plan)
        return plan.schedule()

    def complete(self, item: ScheduledSequence, token: int | None, finished: bool) -> None:
        """Record that the item was computed; call it once for each item of the step that was run,
        or ``complete_lanes`` for those of an ensemble.

        ``token`` is the one drawn where ``item.samples``, else None; it is appended to the
        sequence. With ``finished`` the sequence ends and gives back all it holds (then ``token``
        may be None: nothing was to be drawn). Raises SchedulerStateError for an item out of date.
        """
        self.complete_lanes((item,), token, finished)

    def complete_lanes(
        self, items: SequenceABC[ScheduledSequence], token: int | None, finished: bool
    ) -> None:
        """As ``complete`` for the items of a step that are one sequence's: all lanes it computed.

        The tenant is charged for each lane's token.
        """
        seq = items[0].sequence.whole or items[0].sequence
        if seq not in self._running:
            where = f"is not at position {items[0].start}"
            raise SchedulerStateError(f"sequence {seq.id} {where}: it does not run")
        completion.enter(self._blocks, seq, items, token, finished=finished)
        if token is not None and not seq.background:
            self._queue.fair.charge_output(seq.tenant, len(seq.computed))
        if finished:
            self._running.leave(seq)
            self._forget(seq)

    # -- inside

    def _schedule_running(self, priority: Priority, plan: StepPlan) -> None:
        """Tokens for those of one priority that run, decodes first."""
        for seq in self._running.of(priority):
            if seq in self._running and decodes(seq) and plan.left >= len(seq.computed):
                self._schedule_decode(seq, plan)
        for seq in self._running.of(priority):
            if plan.left and not decodes(seq):
                plan.chunk(seq)

    def _schedule_decode(self, seq: Sequence, plan: StepPlan) -> None:
        """A token for a running sequence that lacks just one, if need be at others' cost.

        Called in the order of admission, so that nobody is preempted who was given a token before.
        """
        while not self._holdings.grow(seq):
            victim = self._running.victim()
            self._preempt(victim, plan)
            if victim is seq:
                return
        plan.decode(seq)

    def _schedule_background(self, plan: StepPlan) -> None:
        """What is left of the step, as ``scheduler/background.py`` says."""
        if self._queue:
            self._background.withdraw()
        if self._queue or len(self._running) > self._running.num_background:
            plan.left = min(plan.left, self._budget.background_tokens)
        self._schedule_running(Priority.BACKGROUND, plan)
        # Who was just preempted comes back at once rather than that a step has no work.
        if self._queue or (plan.preempted and plan):
            return
        while failed := self._background.admit(plan, self._running, self._budget.max_num_seqs):
            self._fail(*failed)

    def _admit(self, plan: StepPlan, room: bool) -> None:
        """Admit while there is room, then get the next ones' adapters on their way."""
        if not self._queue:
            return
        scan = self._queue.scan()
        while room and plan.left and self._running.live_places < self._budget.max_num_seqs:
            seq = scan.head()
            if seq is None:
                return
            if not self._heed(scan, seq, self._holdings.prepare(seq)):
                continue
            if not (self._take_places(seq, plan) and self._take_blocks(seq, plan)):
                break  # its turn: anyone after it would take what it waits for
            if not self._lease(scan, seq):
                continue
            scan.take()
            self._running.enter(seq)
            if seq.preemptions == 0:
                self._first_admissions.append(seq)
            plan.chunk(seq)
        for seq in scan.ahead(_LOOKAHEAD):
            answer = self._holdings.prepare(seq)
            if isinstance(answer, Failed):
                self._queue.remove(seq)
                self._fail(seq, answer.error)

    def _take_places(self, seq: Sequence, plan: StepPlan) -> bool:
        """Places for all lanes of a live sequence, if need be those of background ones."""
        room = self._budget.max_num_seqs - len(seq.computed)
        while room < self._running.places and self._running.live_places <= room:
            self._yield_last(plan)
        return self._running.places <= room

    def _take_blocks(self, seq: Sequence, plan: StepPlan) -> bool:
        """Blocks for all tokens of a live sequence, if need be those of background ones."""
        while not self._holdings.take_blocks(seq, alone=not self._running):
            if not self._yield_last(plan):
                return False
        return True

    def _yield_last(self, plan: StepPlan) -> bool:
        """Preempt the background sequence admitted last; whether there was one."""
        victim = self._running.last_background()
        if victim is not None:
            self._preempt(victim, plan)
        return victim is not None

    def _yield_leases(self, plan: StepPlan) -> bool:
        """Preempt the background sequences that hold a lease; whether there was one."""
        worn = self._running.background_leases()
        for seq in worn:
            self._preempt(seq, plan)
        return bool(worn)

    def _lease(self, scan: Scan, seq: Sequence) -> bool:
        """Take the leases of the head, which has its blocks; without them those go back."""
        if self._heed(scan, seq, self._holdings.lease(seq)):
            return True
        self._holdings.cancel_blocks(seq)
        return False

    def _heed(self, scan: Scan, seq: Sequence, answer: Admission) -> bool:
        """Whether it is Ready; else the head is passed over (its adapter is pending) or fails."""
        if isinstance(answer, Failed):
            scan.drop()
            self._fail(seq, answer.error)
        elif isinstance(answer, Pending):
            scan.pass_over()
            self._pending = True
        return isinstance(answer, Ready)

    def _preempt(self, seq: Sequence, plan: StepPlan) -> None:
        self._running.leave(seq)
        seq.status = SequenceStatus.WAITING
        seq.preemptions += 1
        for lane in seq.computed:
            lane.num_computed = 0
        (self._background if seq.background else self._queue).push_front(seq)
        plan.preempted.append(seq)

    def _fail(self, seq: Sequence, error: ManyhatsError) -> None:
        self._holdings.cancel(seq)
        self._failed.append((seq, error))
        self._forget(seq)

    def _forget(self, seq: Sequence) -> None:
        seq.status = SequenceStatus.FINISHED
        siblings = self._requests[seq.request_id]
        siblings.remove(seq)
        if not siblings:
            del self._requests[seq.request_id]
