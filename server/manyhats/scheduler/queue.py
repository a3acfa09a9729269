"""The sequences that wait to be admitted, and the order in which they are served.

The tenant that has had the least service is served next (``fair.FairShares``); of equals, the one
whose last turn is longest ago. Within a tenant, preempted sequences come first (their readers wait
in mid-sentence), then the most urgent, of equals the one whose deadline is the earliest (one
without a deadline comes last), then the oldest.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Iterator
from heapq import heapify, heappop, heappush, heapreplace
from math import inf

from manyhats.scheduler.fair import FairShares
from manyhats.types import AdapterRef, Digest, Sequence, TenantId

_Key = tuple[bool, int, float, int]
_Group = deque[Sequence]


def adapter_digest(seq: Sequence) -> Digest | None:
    """The adapter that the sequence wears, None for the base."""
    return seq.adapter.digest if seq.adapter is not None else None


def _key(seq: Sequence) -> _Key:
    deadline = math.inf if seq.deadline is None else seq.deadline
    return (seq.preemptions == 0, -seq.urgency, deadline, seq.id)


class WaitingQueue:
    """Grouped by tenant, then by adapter, so that a scan passes over a whole group at once.

    ``fair`` decides between tenants and is told who waits and who is served.
    """

    def __init__(self, fair: FairShares | None = None) -> None:
        self.fair = fair or FairShares()
        self._tenants: OrderedDict[TenantId, dict[Digest | None, _Group]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        """Every waiting sequence, in no promised order."""
        for groups in self._tenants.values():
            for group in groups.values():
                yield from group

    def push(self, seq: Sequence) -> None:
        """Queue a new sequence at its place among its tenant's, the last of its equals."""
        group = self._group(seq)
        if not group or _key(group[-1]) <= _key(seq):  # nearly always: nobody is in a hurry
            group.append(seq)
        else:
            group.insert(bisect_right(group, _key(seq), key=_key), seq)
        self._length += 1

    def push_front(self, seq: Sequence) -> None:
        """Queue a preempted sequence before its tenant's."""
        self._group(seq).appendleft(seq)
        self._length += 1

    def remove(self, seq: Sequence) -> None:
        """Take a waiting sequence out. Raises ValueError if it does not wait."""
        group = self._tenants.get(seq.tenant, {}).get(adapter_digest(seq), _Group())
        group.remove(seq)
        self._left(seq)

    def adapters(self) -> tuple[AdapterRef, ...]:
        """The adapters that waiting sequences wear, each once."""
        found = {
            digest: group[0].adapter
            for groups in self._tenants.values()
            for digest, group in groups.items()
        }
        return tuple(ref for ref in found.values() if ref is not None)

    def scan(self) -> Scan:
        """Start a pass over the queue."""
        return Scan(self)

    def _group(self, seq: Sequence) -> _Group:
        if seq.tenant not in self._tenants:
            self.fair.enter(seq.tenant, self._tenants.keys())
        groups = self._tenants.setdefault(seq.tenant, {})
        return groups.setdefault(adapter_digest(seq), _Group())

    def _left(self, seq: Sequence) -> None:
        """The sequence was taken out of its group: keep no empty group and no empty tenant."""
        self._length -= 1
        groups = self._tenants[seq.tenant]
        if not groups[adapter_digest(seq)]:
            del groups[adapter_digest(seq)]
        if not groups:
            del self._tenants[seq.tenant]
            self.fair.leave(seq.tenant)


class Scan:
    """One pass over the queue in the order of service, seeing each sequence at most once.

    The caller does one of three things with each ``head``: ``take``, ``drop`` or ``pass_over``.
    It costs two heap operations a sequence taken and one a group passed over, however long the
    groups are. The queue changes only through the scan while it lasts.
    """

    def __init__(self, queue: WaitingQueue) -> None:
        self._queue = queue
        waiting = queue._tenants.keys()
        self._turns: list[tuple[tuple[int, float], int, TenantId]] = [
            (queue.fair.rank(tenant, waiting), number, tenant)
            for number, tenant in enumerate(queue._tenants)
        ]
        heapify(self._turns)
        self._number = len(self._turns)  # of the next turn: who had one goes behind its equals
        self._heaps: dict[TenantId, list[tuple[_Key, Digest | None]]] = {}
        self._passed: dict[Digest | None, float] = {}  # adapter: the oldest it was pending for

    def head(self) -> Sequence | None:
        """The sequence that is to be served next, None when nothing is left to look at."""
        while self._turns:
            seq = self._first(self._turns[0][2])
            if seq is not None:
                return seq
            heappop(self._turns)
        return None

    def take(self) -> None:
        """The head is served and its tenant charged for the prompt, unless it was before."""
        tenant = self._turns[0][2]
        seq = self.drop()
        fair, tenants = self._queue.fair, self._queue._tenants
        if seq.preemptions == 0:
            fair.charge_prompt(tenant, sum(lane.prompt_len for lane in seq.computed))
        if tenant in tenants:
            tenants.move_to_end(tenant)
            heapreplace(self._turns, (fair.rank(tenant, tenants.keys()), self._number, tenant))
            self._number += 1

    def drop(self) -> Sequence:
        """The head leaves the queue unserved and is returned; its tenant keeps its turn."""
        tenant = self._turns[0][2]
        heap = self._heaps[tenant]
        _, digest = heappop(heap)
        group = self._queue._tenants[tenant][digest]
        seq = group.popleft()
        if group:
            heappush(heap, (_key(group[0]), digest))
        self._queue._left(seq)
        return seq

    def pass_over(self) -> None:
        """Look at no further sequence with the head's adapter in this pass, but older ones: an
        adapter that makes room for somebody older than the head is still theirs.
        """
        tenant = self._turns[0][2]
        digest = self._heaps[tenant][0][1]
        asked = self._queue._tenants[tenant][digest][0].id
        self._passed[digest] = min(asked, self._passed.get(digest, asked))

    def ahead(self, limit: int) -> list[Sequence]:
        """The next sequences of up to ``limit`` adapters not looked at yet; this ends the pass.

        Tenants take turns here, the one to be served next first: nobody is charged for a look.
        """
        found: list[Sequence] = []
        ring = deque(tenant for _, _, tenant in sorted(self._turns))
        self._turns = []
        while len(found) < limit and ring:
            seq = self._first(ring[0])
            if seq is None:
                ring.popleft()
                continue
            if seq.adapter is not None:
                found.append(seq)
            self._passed[adapter_digest(seq)] = -inf
            ring.rotate(-1)
        return found

    def _first(self, tenant: TenantId) -> Sequence | None:
        """The tenant's next sequence whose adapter is not passed over."""
        if tenant not in self._queue._tenants:
            return None
        heap, groups = self._heap(tenant), self._queue._tenants[tenant]
        while heap and groups[heap[0][1]][0].id >= self._passed.get(heap[0][1], inf):
            heappop(heap)
        return groups[heap[0][1]][0] if heap else None

    def _heap(self, tenant: TenantId) -> list[tuple[_Key, Digest | None]]:
        heap = self._heaps.get(tenant)
        if heap is None:
            groups = self._queue._tenants[tenant]
            heap = self._heaps[tenant] = [(_key(g[0]), digest) for digest, g in groups.items()]
            heapify(heap)
        return heap
