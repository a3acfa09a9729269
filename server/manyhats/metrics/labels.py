"""The bound on the values of the ``adapter`` label."""

from __future__ import annotations

import threading
from typing import Final

BASE_LABEL: Final = "base"
"""The bare base."""
OTHER_LABEL: Final = "other"
"""Every adapter beyond the bound."""


class LabelCap:
    """Bounds the values of a label: the first ``max_labels`` names keep their own, later ones are
    ``other``.

    Holds at most ``max_labels`` names, whatever arrives. Thread-safe. An adapter that is itself
    called ``base`` or ``other`` gets ``adapter:base`` or ``adapter:other``.
    """

    def __init__(self, max_labels: int) -> None:
        self._max = max_labels
        self._labels: dict[str, str] = {}
        self._lock = threading.Lock()

    def label(self, name: str | None) -> str:
        """The label value of an adapter's name; None is the bare base."""
        if name is None:
            return BASE_LABEL
        known = self._labels.get(name)
        if known is not None:
            return known
        with self._lock:
            if name not in self._labels and len(self._labels) < self._max:
                reserved = name in (BASE_LABEL, OTHER_LABEL)
                self._labels[name] = f"adapter:{name}" if reserved else name
            return self._labels.get(name, OTHER_LABEL)
