"""The memory of the rank rows of all linear layers: one allocation, its pages had ahead of need.

On a CPU a page is nothing until it is written to, and then the system takes longer to give it than
writing it takes. So while an adapter is on its way from the disk, the pages are asked for that it
will be written to if it is like the one before and comes after all rows that were ever in use.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

from manyhats.adapters.parts import SiteSpec

_ALIGN: Final = 64
"""Bytes of a cache line, at which each tensor begins."""

_Numbers = np.ndarray[Any, np.dtype[np.int64]]


class RowMemory:
    """``rows`` rank rows at each of ``sites``; ``wrote`` and ``ahead`` are for their one writer."""

    def __init__(
        self, sites: Sequence[SiteSpec], rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._rows = rows
        widths = [width for site in sites for width in (site.in_features, site.out_features)]
        self._widths: _Numbers = np.array(widths, dtype=np.int64) * dtype.itemsize
        sizes = -(-self._widths * rows // _ALIGN) * _ALIGN
        self._begins: _Numbers = np.cumsum(sizes) - sizes
        self._bytes = torch.empty(int(sizes.sum()), dtype=torch.uint8, device=device)
        self._tensors = [
            self._bytes[begin : begin + rows * width]
            .view(dtype)
            .view(rows, width // dtype.itemsize)
            for begin, width in zip(self._begins.tolist(), self._widths.tolist(), strict=True)
        ]
        self._place = {site.name: number for number, site in enumerate(sites)}
        self._written: _Numbers = np.zeros(len(sites), dtype=np.int64)  # the end of what ever was
        self._last = self._written.copy()  # rows of the adapter that came last
        self._had = self._written.copy()  # the end of the rows whose pages are there

    def of(self, site: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A's and B's rows, [rows, in] and [rows, out]."""
        number = 2 * self._place[site]
        return self._tensors[number], self._tensors[number + 1]

    def wrote(self, runs: Mapping[str, tuple[int, int]]) -> None:
        """An adapter has been written to these runs: a site's name to (start, count). A site that
        is not here (the head) is left out.
        """
        self._last[:] = 0
        for site, (start, count) in runs.items():
            number = self._place.get(site)
            if number is not None:
                self._last[number] = count
                self._written[number] = max(self._written[number], start + count)
        np.maximum(self._had, self._written, out=self._had)

    def ahead(self) -> int:
        """Has the system give the pages after all rows in use, enough for another adapter like the
        last one. Returns how many; those of a former call that were not needed count among them.
        """
        if self._bytes.device.type != "cpu":
            return 0
        ends = np.minimum(self._written + self._last, self._rows)
        begin = self._begins + np.repeat(self._had, 2) * self._widths
        end = self._begins + np.repeat(np.maximum(ends, self._had), 2) * self._widths
        self._had = np.maximum(ends, self._had)
        # Where pages begin in these stretches: what is written there is no row in use.
        base = self._bytes.data_ptr()
        first = -(-(base + begin) // mmap.PAGESIZE)
        count = np.maximum(-(-(base + end) // mmap.PAGESIZE) - first, 0)
        steps = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        pages = (np.repeat(first, count) + steps) * mmap.PAGESIZE - base
        self._bytes.index_fill_(0, torch.from_numpy(pages), 0)  # one call, without the GIL
        return len(pages)
