"""A safetensors file in memory, its values checked, and its tensors as views of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise

import torch

from manyhats.adapters.finite import all_finite, finite_bytes
from manyhats.adapters.header import Header, TensorInfo
from manyhats.adapters.strict_json import shown
from manyhats.errors import AdapterRejectedError


class WeightsFile:
    """A checked safetensors file in memory. Tensors are views of it, made when asked for.

    Immutable after construction, so any thread may read it.
    """

    def __init__(
        self, data: bytearray | memoryview, header: Header, *, finite: bool = False
    ) -> None:
        """``finite``: the values are known to be, and not looked at."""
        self._data = data
        self._header = header
        # One pass over each run of a dtype; which tensor fails is looked for when it is loaded.
        self._finite = finite or all(
            finite_bytes(data, begin, end, dtype) for dtype, begin, end in _runs(header)
        )

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """What the file holds, by name."""
        return self._header.tensors

    @property
    def metadata(self) -> Mapping[str, str]:
        """The header's own metadata; trusted for nothing."""
        return self._header.metadata

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return len(self._data)

    def load(self, name: str) -> torch.Tensor:
        """The tensor ``name`` in the file's dtype and shape, on the CPU; it shares the file's
        memory: do not write.

        Raises:
            AdapterRejectedError: ``non_finite`` where a value is NaN or infinite,
                ``missing_tensors`` where the file has no such tensor.
        """
        info = self.tensors.get(name)
        if info is None:
            raise AdapterRejectedError("missing_tensors", f"the file has no tensor {shown(name)}")
        if info.begin == info.end:
            return torch.empty(info.shape, dtype=info.dtype)
        size = info.dtype.itemsize
        buffer, offset = self._data, info.begin
        if offset % size:
            # the format does not promise the alignment that torch's loads want
            buffer, offset = bytearray(self._data[info.begin : info.end]), 0
        flat = torch.frombuffer(
            buffer, dtype=info.dtype, count=(info.end - info.begin) // size, offset=offset
        )
        tensor = flat.view(info.shape)
        if not self._finite and not all_finite(tensor):
            raise AdapterRejectedError("non_finite", f"{shown(name)} holds NaN or infinite values")
        return tensor

    def load_alike(self, names: Sequence[str]) -> torch.Tensor:
        """Tensors of one shape and dtype as one, [names, ...]; else as ``load``.

        Where they are asked for in the file's order and lie at even distances, as those of a
        model's layers do, it is a view: do not write.
        """
        infos = [self.tensors[name] for name in names if name in self.tensors]
        step = _distance(infos) if self._finite and len(infos) == len(names) else None
        if step is None:
            return torch.stack([self.load(name) for name in names])
        first, size = infos[0], infos[0].dtype.itemsize
        count = (infos[-1].end - first.begin) // size
        flat = torch.frombuffer(self._data, dtype=first.dtype, count=count, offset=first.begin)
        strides = [math.prod(first.shape[place + 1 :]) for place in range(len(first.shape))]
        return flat.as_strided((len(infos), *first.shape), (step // size, *strides))


def _runs(header: Header) -> Iterator[tuple[torch.dtype, int, int]]:
    """The dtypes in the file's order, each with the bytes from where to where it lies."""
    for dtype, infos in groupby(header.tensors.values(), key=lambda info: info.dtype):
        run = list(infos)
        yield dtype, run[0].begin, run[-1].end


def _distance(infos: Sequence[TensorInfo]) -> int | None:
    """Bytes from each tensor to the next; None where one view cannot take them in."""
    if not infos or infos[0].begin == infos[0].end:
        return None
    first = infos[0]
    step = infos[1].begin - first.begin if len(infos) > 1 else 0
    even = all(after.begin - info.begin == step for info, after in pairwise(infos))
    aligned = first.begin % first.dtype.itemsize == 0 == step % first.dtype.itemsize
    return step if even and step >= 0 and aligned else None
