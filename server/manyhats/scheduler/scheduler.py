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
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC

from manyhats.errors import ManyhatsError, QueueFullError, RequestError
from manyhats.scheduler.blocks import BlockManager, SchedulerStateError
from manyhats.scheduler.budget import Budget
from manyhats.scheduler.fair import FairShares
from manyhats.scheduler.pace import AdmissionPace
from manyhats.scheduler.queue import Scan, WaitingQueue
from manyhats.scheduler.residency import Failed, Pending, Ready, Residency
from manyhats.types import (
    BASE_SLOT,
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
        self._residency = residency
        self._budget = Budget(max_num_seqs, max_step_tokens, max_queue, max_context)
        # Left free at an admission, lest those that run already be preempted at once.
        self._reserve = max(1, blocks.num_blocks // 100)
        self._queue = WaitingQueue(fair)
        self._running: dict[int, Sequence] = {}  # by id, in the order of admission
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
                if seq.adapter is not None:
                    self._residency.cancel(seq)
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
            if len(seq.token_ids) - seq.num_computed > 1:
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
        seq = item.sequence
        if self._running.get(seq.id) is not seq or item.start != seq.num_computed:
            raise SchedulerStateError(f"sequence {seq.id} is not at position {item.start}")
        if (token is not None and not item.samples) or (
            token is None and item.samples and not finished
        ):
            raise SchedulerStateError(f"sequence {seq.id}: token {token}, samples {item.samples}")
        seq.num_computed = item.start + item.count
        self._blocks.commit(seq, seq.num_computed)
        if token is not None:
            seq.token_ids.append(token)
            self._queue.fair.charge_output(seq.tenant)
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
            known = len(seq.token_ids)
            if seq.status is not SequenceStatus.RUNNING or known - seq.num_computed != 1:
                continue
            while not self._blocks.allocate(seq, known):
                victim = next(reversed(self._running.values()))
                self._preempt(victim)
                preempted.append(victim)
                if victim is seq:
                    break
            else:
                items.append(ScheduledSequence(seq, seq.num_computed, 1, True))
        return preempted

    def _schedule_chunk(self, seq: Sequence, budget: int, items: list[ScheduledSequence]) -> int:
        left = len(seq.token_ids) - seq.num_computed
        count = min(budget, left)
        items.append(ScheduledSequence(seq, seq.num_computed, count, count == left))
        return count

    def _admit(self, budget: int, items: list[ScheduledSequence]) -> None:
        """Admit while there is room, then get the next ones' adapters on their way."""
        if not self._queue:
            return
        scan = self._queue.scan()
        while budget and len(self._running) < self._budget.max_num_seqs:
            seq = scan.head()
            if seq is None:
                return
            if not self._adapter_ready(scan, seq):
                continue
            if not self._take_blocks(seq):
                break  # its turn: anyone after it would take the blocks it waits for
            if not self._lease(scan, seq):
                continue
            scan.take()
            self._running[seq.id] = seq
            seq.status = SequenceStatus.RUNNING
            if seq.preemptions == 0:
                self._first_admissions.append(seq)
            budget -= self._schedule_chunk(seq, budget, items)
        for seq in scan.ahead(_LOOKAHEAD):
            answer = self._residency.prepare(seq)
            if isinstance(answer, Failed):
                self._queue.remove(seq)
                self._fail(seq, answer.error)

    def _adapter_ready(self, scan: Scan, seq: Sequence) -> bool:
        """Whether the head could be leased its adapter now; if not, the scan goes on without it."""
        if seq.adapter is None:
            return True
        return self._heed(scan, seq, self._residency.prepare(seq)) is not None

    def _lease(self, scan: Scan, seq: Sequence) -> bool:
        """Take the lease of the head, which has its blocks; without it they go back."""
        if seq.adapter is None:
            seq.slot = BASE_SLOT
            return True
        slot = self._heed(scan, seq, self._residency.acquire(seq))
        if slot is None:
            self._blocks.cancel_match(seq)
            seq.num_computed = 0
            return False
        seq.slot = slot
        return True

    def _heed(self, scan: Scan, seq: Sequence, answer: Ready | Pending | Failed) -> int | None:
        """The slot, or None once the head is passed over (its adapter is pending) or has failed."""
        if isinstance(answer, Ready):
            return answer.slot
        if isinstance(answer, Failed):
            scan.drop()
            self._fail(seq, answer.error)
        else:
            scan.pass_over()
        return None

    def _take_blocks(self, seq: Sequence) -> bool:
        """Blocks for all known tokens, cached ones included; for one alone there always are."""
        if self._running and self._blocks.num_free <= self._reserve:
            return False
        cached = self._blocks.match(seq)
        fits = self._blocks.allocate(seq, len(seq.token_ids))
        if fits and self._running and self._blocks.num_free < self._reserve:
            fits = False
        if not fits:
            self._blocks.cancel_match(seq)
            return False
        seq.num_computed = cached
        seq.num_cached = min(cached, seq.prompt_len)
        return True

    def _preempt(self, seq: Sequence) -> None:
        self._leave(seq)
        seq.status = SequenceStatus.WAITING
        seq.num_computed = 0
        seq.preemptions += 1
        self._queue.push_front(seq)

    def _leave(self, seq: Sequence) -> None:
        """Give back what a running sequence holds."""
        del self._running[seq.id]
        self._blocks.free(seq)
        if seq.adapter is not None:
            self._residency.release(seq)
        seq.slot = BASE_SLOT

    def _fail(self, seq: Sequence, error: ManyhatsError) -> None:
        self._failed.append((seq, error))
        self._forget(seq)

    def _forget(self, seq: Sequence) -> None:
        seq.status = SequenceStatus.FINISHED
        siblings = self._requests[seq.request_id]
        siblings.remove(seq)
        if not siblings:
            del self._requests[seq.request_id]
