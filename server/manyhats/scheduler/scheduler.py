"""What each step computes: continuous batching with chunked prefill, preemption and adapter leases.

Pure policy: no tensor, no clock but the ``now`` that is passed in, one thread. A step is::

    schedule = scheduler.schedule(now)      # who, which tokens; blocks and leases are taken
    tokens = run(schedule)                  # elsewhere
    for item, token in ...:
        scheduler.complete(item, token, finished)

The order within a step: a token for every running sequence that decodes, then the next chunks of
running prefills in the order of admission, then new admissions, while the token budget lasts. So
prefill never starves decoding; nor can decoding starve itself, as the budget is at least
``max_num_seqs`` tokens.

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
from manyhats.scheduler.blocks import BlockManager, SchedulerStateError
from manyhats.scheduler.budget import Budget
from manyhats.scheduler.fair import FairShares
from manyhats.scheduler.holdings import Holdings
from manyhats.scheduler.pace import AdmissionPace
from manyhats.scheduler.queue import Scan, WaitingQueue
from manyhats.scheduler.residency import Admission, Failed, Pending, Ready, Residency
from manyhats.types import (
    AdapterRef,
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
        fair: FairShares | None = None,
    ) -> None:
        self._blocks = blocks
        self._budget = Budget(max_num_seqs, max_step_tokens, max_queue, max_context)
        self._holdings = Holdings(blocks, residency)
        self._queue = WaitingQueue(fair)
        self._running: dict[int, Sequence] = {}  # by id, in the order of admission
        self._lanes = 0  # of those that run
        self._requests: dict[str, list[Sequence]] = {}  # unfinished sequences
        self._failed: list[tuple[Sequence, ManyhatsError]] = []
        self._first_admissions: list[Sequence] = []
        self._pace = AdmissionPace()

    # -- state

    @property
    def num_waiting(self) -> int:
        """Sequences that wait, preempted ones included."""
        return len(self._queue)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._requests)

    @property
    def first_admissions(self) -> SequenceABC[Sequence]:
        """The sequences that the latest ``schedule`` admitted for the first time."""
        return tuple(self._first_admissions)

    def waiting_adapters(self) -> tuple[AdapterRef, ...]:
        """The adapters that waiting sequences wear, each once."""
        return self._queue.adapters()

    # -- coming and going

    def add(self, seq: Sequence) -> None:
        """Queue one sequence; see ``add_all``."""
        self.add_all((seq,))

    def add_all(self, seqs: SequenceABC[Sequence]) -> None:
        """Queue all choices of a request, or none.

        Raises ContextLengthError where one can never fit the context or the cache, RequestError for
        an empty prompt or more choices than may ever wait, QueueFullError where the queue has no
        room for them now.
        """
        for seq in seqs:
            self._budget.check(seq, self._blocks)
        if len(seqs) > self._budget.max_queue:
            raise RequestError(
                f"n is {len(seqs)}, and at most {self._budget.max_queue} sequences may wait.",
                param="n",
            )
        if len(self._queue) + len(seqs) > self._budget.max_queue:
            raise QueueFullError(
                f"{len(self._queue)} sequences are waiting, of at most {self._budget.max_queue}.",
                retry_after_s=self._pace.retry_after_s(len(self._queue)),
            )
        for seq in seqs:
            self._requests.setdefault(seq.request_id, []).append(seq)
            self._queue.push(seq)

    def abort(self, request_id: str) -> list[Sequence]:
        """End the request's unfinished sequences, free all they hold, and return them (none: []).

        No item of theirs may be completed afterwards.
        """
        seqs = list(self._requests.get(request_id, ()))
        for seq in seqs:
            if seq.status is SequenceStatus.RUNNING:
                self._leave(seq)
            else:
                self._queue.remove(seq)
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
        decodes: list[ScheduledSequence] = []
        chunks: list[ScheduledSequence] = []
        preempted = self._schedule_decodes(decodes)
        budget = self._budget.max_step_tokens - len(decodes)
        for seq in self._running.values():
            if budget == 0:
                break
            if not _decodes(seq):
                budget -= self._schedule_chunk(seq, budget, chunks)
        self._first_admissions = []
        self._admit(0 if preempted else budget, chunks)
        self._pace.note(now, len(self._first_admissions))
        # A chunk of one token that reaches the end is a decode for whoever packs the batch.
        short = [item for item in chunks if item.count == 1 and item.samples]
        long = [item for item in chunks if item.count > 1 or not item.samples]
        return Schedule((*decodes, *short, *long), tuple(preempted))

    def complete(self, item: ScheduledSequence, token: int | None, finished: bool) -> None:
        """Record that the item was computed; call it once for each item of the step that was run.

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
        if self._running.get(seq.id) is not seq:
            where = f"is not at position {items[0].start}"
            raise SchedulerStateError(f"sequence {seq.id} {where}: it does not run")
        _check_items(seq, items, token, finished)
        for item in items:
            lane = item.sequence
            lane.num_computed = item.start + item.count
            self._blocks.commit(lane, lane.num_computed)
            if token is not None:
                lane.token_ids.append(token)
                self._queue.fair.charge_output(seq.tenant)
        if token is not None and seq.lanes:
            seq.token_ids.append(token)
        if finished:
            self._leave(seq)
            self._forget(seq)

    # -- inside

    def _schedule_decodes(self, items: list[ScheduledSequence]) -> list[Sequence]:
        """A token for every running sequence that lacks just one; returns whom that preempted.

        In the order of admission, so that nobody is preempted who was given a token before.
        """
        preempted: list[Sequence] = []
        for seq in tuple(self._running.values()):
            if seq.status is not SequenceStatus.RUNNING or not _decodes(seq):
                continue
            while not self._holdings.grow(seq):
                victim = next(reversed(self._running.values()))
                self._preempt(victim)
                preempted.append(victim)
                if victim is seq:
                    break
            else:
                items += [ScheduledSequence(e, e.num_computed, 1, True) for e in seq.computed]
        return preempted

    def _schedule_chunk(self, seq: Sequence, budget: int, items: list[ScheduledSequence]) -> int:
        """What is left of the sequence, or as much as the budget lets; lanes end together."""
        ends = sum(lane.left for lane in seq.computed) <= budget
        kept = 1 if seq.lanes and not ends else 0  # the last token, which draws the next one
        taken = 0
        for lane in seq.computed:
            count = min(budget - taken, lane.left - kept)
            if count > 0:
                items.append(ScheduledSequence(lane, lane.num_computed, count, ends))
                taken += count
        return taken

    def _admit(self, budget: int, items: list[ScheduledSequence]) -> None:
        """Admit while there is room, then get the next ones' adapters on their way."""
        if not self._queue:
            return
        scan = self._queue.scan()
        while budget and self._lanes < self._budget.max_num_seqs:
            seq = scan.head()
            if seq is None:
                return
            if not self._adapter_ready(scan, seq):
                continue
            if self._lanes + len(seq.computed) > self._budget.max_num_seqs:
                break  # its turn: anyone after it would take the places it waits for
            if not self._holdings.take_blocks(seq, alone=not self._running):
                break  # and the blocks
            if not self._lease(scan, seq):
                continue
            scan.take()
            self._running[seq.id] = seq
            self._lanes += len(seq.computed)
            seq.status = SequenceStatus.RUNNING
            if seq.preemptions == 0:
                self._first_admissions.append(seq)
            budget -= self._schedule_chunk(seq, budget, items)
        for seq in scan.ahead(_LOOKAHEAD):
            answer = self._holdings.prepare(seq)
            if isinstance(answer, Failed):
                self._queue.remove(seq)
                self._fail(seq, answer.error)

    def _adapter_ready(self, scan: Scan, seq: Sequence) -> bool:
        """Whether the head could be leased its adapter now; if not, the scan goes on without it."""
        return self._heed(scan, seq, self._holdings.prepare(seq))

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
        return isinstance(answer, Ready)

    def _preempt(self, seq: Sequence) -> None:
        self._leave(seq)
        seq.status = SequenceStatus.WAITING
        seq.preemptions += 1
        for lane in seq.computed:
            lane.num_computed = 0
        self._queue.push_front(seq)

    def _leave(self, seq: Sequence) -> None:
        """Give back what a running sequence holds."""
        del self._running[seq.id]
        self._lanes -= len(seq.computed)
        self._holdings.give_back(seq)

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


def _decodes(seq: Sequence) -> bool:
    """Whether a running sequence, with all its lanes, lacks just one token."""
    return all(lane.left == 1 for lane in seq.computed)


def _check_items(
    seq: Sequence, items: SequenceABC[ScheduledSequence], token: int | None, finished: bool
) -> None:
    """Raises SchedulerStateError for items out of date or a token that nobody was to draw."""
    for item in items:
        lane = item.sequence
        if (lane.whole or lane) is not seq or item.start != lane.num_computed:
            raise SchedulerStateError(f"sequence {lane.id} is not at position {item.start}")
        if (token is not None and not item.samples) or (
            token is None and item.samples and not finished
        ):
            raise SchedulerStateError(f"sequence {lane.id}: token {token}, samples {item.samples}")
    if (token is not None or finished) and len(items) != len(seq.computed):
        raise SchedulerStateError(f"sequence {seq.id} ends a step with some of its lanes")
