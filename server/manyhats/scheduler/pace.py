"""How fast sequences have lately been admitted, to tell a refused caller when to come back."""

from __future__ import annotations

from math import ceil, exp

_WINDOW_S = 30.0
_LONGEST_S = 60.0


class AdmissionPace:
    """An exponentially fading count of admissions, with a memory of about 30 seconds."""

    def __init__(self) -> None:
        self._count = 0.0
        self._first: float | None = None
        self._last = 0.0

    def note(self, now: float, admitted: int) -> None:
        """Tell that ``admitted`` sequences were admitted at ``now`` (seconds, monotonic)."""
        if self._first is None:
            self._first = self._last = now
        self._count = self._count * exp(-(now - self._last) / _WINDOW_S) + admitted
        self._last = now

    def retry_after_s(self, waiting: int) -> float:
        """Seconds until about a tenth of the queue has gone: whole, 1 to 60."""
        if self._first is None or self._count < 1e-6:
            return 1.0 if self._first is None else _LONGEST_S
        span = min(_WINDOW_S, max(1.0, self._last - self._first))
        return float(min(_LONGEST_S, max(1, ceil(waiting / 10 * span / self._count))))
