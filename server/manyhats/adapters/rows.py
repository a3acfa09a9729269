"""One site's pool of rank rows: contiguous runs, best fit, merged when they come back."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable


class SlotStateError(RuntimeError):
    """A call that the state of the rows or slots does not allow: a mistake of the calling code."""


class RowAllocator:
    """Hands out runs of rows ``[start, start + count)`` of a pool of ``rows`` rows.

    Free runs are at most one more than the runs handed out, which the number of slots bounds;
    every operation is linear in them.
    """

    __slots__ = ("_free", "_runs", "rows")

    def __init__(self, rows: int) -> None:
        if rows < 0:
            raise ValueError(f"rows must be at least 0, not {rows}")
        self.rows = rows
        self._runs: list[tuple[int, int]] = [(0, rows)] if rows else []
        self._free = rows

    @property
    def free_rows(self) -> int:
        """Rows in no run, whether or not they lie together."""
        return self._free

    @property
    def used_rows(self) -> int:
        """Rows handed out."""
        return self.rows - self._free

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """The free runs as ``(start, length)``, in order, none touching the next."""
        return tuple(self._runs)

    def fits(self, count: int, returned: Iterable[tuple[int, int]] = ()) -> bool:
        """Whether ``count`` rows lie together, once the runs ``returned`` would have come back."""
        if any(length >= count for _, length in self._runs):
            return True
        back = [run for run in returned if run[1]]
        if not back:
            return count == 0
        return largest_run([*self._runs, *back]) >= count

    def take(self, count: int) -> int:
        """Start of a run of ``count`` rows, from the smallest free run that holds it.

        Raises SlotStateError where no free run does (ask ``fits`` first).
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, not {count}")
        best = -1
        for index, (_, length) in enumerate(self._runs):
            if length >= count and (best < 0 or length < self._runs[best][1]):
                best = index
        if best < 0:
            raise SlotStateError(f"no run of {count} rows: {self._free} of {self.rows} are free")
        start, length = self._runs[best]
        if length == count:
            del self._runs[best]
        else:
            self._runs[best] = (start + count, length - count)
        self._free -= count
        return start

    def give(self, start: int, count: int) -> None:
        """Take the run back and merge it with its free neighbours.

        Raises SlotStateError where any of it is free already or outside the pool.
        """
        at = bisect_left(self._runs, (start, 0))
        before = self._runs[at - 1] if at else (0, 0)
        after = self._runs[at] if at < len(self._runs) else (self.rows, 0)
        end = start + count
        if count < 1 or start < 0 or start < sum(before) or end > after[0]:
            raise SlotStateError(f"rows [{start}, {end}) were not handed out")
        merge_before = at > 0 and sum(before) == start
        merge_after = at < len(self._runs) and after[0] == end
        low = before[0] if merge_before else start
        high = sum(after) if merge_after else end
        self._runs[at - merge_before : at + merge_after] = [(low, high - low)]
        self._free += count


def largest_run(runs: Iterable[tuple[int, int]]) -> int:
    """Length of the longest stretch that the ``(start, length)`` runs make, touching ones joined.

    The runs overlap nowhere and none is empty.
    """
    longest = stretch = 0
    expected = -1
    for start, length in sorted(runs):
        stretch = stretch + length if start == expected else length
        expected = start + length
        longest = max(longest, stretch)
    return longest
