"""The safetensors header, checked by ourselves before a byte of any tensor is used.

Layout (https://github.com/huggingface/safetensors#format): 8 bytes, little endian, length N of the
header; N bytes of JSON ``{name: {dtype, shape, data_offsets: [begin, end]}, "__metadata__": {str:
str}}``; then the tensors' bytes, to which the offsets refer. We take a subset: three float dtypes,
one to three dimensions. One of them may be 0: AdaLoRA prunes whole modules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Final

import torch

from manyhats.adapters.strict_json import parse_object, shown
from manyhats.errors import AdapterRejectedError

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The dtypes taken, by their name in the header."""

_PREFIX_BYTES: Final = 8
_MAX_NAME: Final = 512
_MAX_DIMENSIONS: Final = 3
_MAX_DEPTH: Final = 4  # header, entry, list
_KEPT_BYTES: Final = 1 << 18
"""Of the longest header that is kept parsed."""
_FIELDS: Final = frozenset({"dtype", "shape", "data_offsets"})
_METADATA: Final = "__metadata__"
# The first byte of a pickle (protocol 2 on) and of a zip archive (torch.save's format). A
# safetensors file may begin with either by chance (its header's length), so they only explain a
# file whose header is not one.
_PICKLE_MAGIC: Final = (b"\x80", b"PK")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: ``begin`` and ``end`` are byte offsets into the file itself."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        """Number of values."""
        return (self.end - self.begin) // self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: the tensors in file order, and the file's own metadata."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def parse_header(
    data: bytes | bytearray | memoryview, *, max_header_bytes: int, max_tensors: int
) -> Header:
    """Check the header of a whole safetensors file.

    Raises:
        AdapterRejectedError: ``pickle_refused`` (a pickle or a zip archive), ``bad_header``,
            ``too_large`` (more tensors than ``max_tensors``), ``unsupported_dtype``,
            ``shape_mismatch`` (no or over three dimensions).
    """
    pickled = bytes(data[:2]).startswith(_PICKLE_MAGIC)
    try:
        text, start = _text(data, max_header_bytes)
    except AdapterRejectedError:
        _refuse_pickle(pickled)
        raise
    parse = _parse if len(text) <= _KEPT_BYTES else _parse.__wrapped__
    return parse(text, start, len(data), max_tensors, pickled)


@lru_cache(maxsize=8)
def _parse(text: bytes, start: int, size: int, max_tensors: int, pickled: bool) -> Header:
    """What ``text``, the header of a file of ``size`` bytes, says. A header tells names and shapes
    alone, so the adapters of one recipe have the same: each is parsed once.
    """
    try:
        raw = parse_object(
            text, reason="bad_header", what="the safetensors header", max_depth=_MAX_DEPTH
        )
    except AdapterRejectedError:
        _refuse_pickle(pickled)
        raise
    metadata = _metadata(raw.pop(_METADATA, {}))
    if len(raw) > max_tensors:
        raise AdapterRejectedError(
            "too_large", f"{len(raw)} tensors, over the bound of {max_tensors}"
        )
    entries = sorted(
        (_entry(name, entry, start) for name, entry in raw.items()), key=lambda e: e.begin
    )
    _check_cover(entries, start, size)
    tensors = MappingProxyType({entry.name: entry for entry in entries})
    return Header(tensors=tensors, metadata=MappingProxyType(metadata))


def _refuse_pickle(pickled: bool) -> None:
    if pickled:
        raise AdapterRejectedError(
            "pickle_refused", "the weights are a pickle or a zip archive; only safetensors is read"
        ) from None


def _text(data: bytes | bytearray | memoryview, max_header_bytes: int) -> tuple[bytes, int]:
    """The header's text and where it ends."""
    if len(data) < _PREFIX_BYTES:
        raise _bad(f"the file has {len(data)} bytes, less than a header's {_PREFIX_BYTES}")
    length = int.from_bytes(data[:_PREFIX_BYTES], "little")
    start = _PREFIX_BYTES + length
    if start > len(data):
        raise _bad(
            f"the header claims {length} bytes, the file has {len(data)}: cut, or no safetensors"
        )
    if length > max_header_bytes:
        raise _bad(f"the header has {length} bytes, over the bound of {max_header_bytes}")
    text = bytes(data[_PREFIX_BYTES:start])
    if not text.startswith(b"{"):
        raise _bad("the header does not begin with '{'")
    return text, start


def _metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise _bad(f"{_METADATA} is not an object of strings")
    return value


def _entry(name: str, entry: object, start: int) -> TensorInfo:
    if not 0 < len(name) <= _MAX_NAME:
        raise _bad(f"a tensor's name has {len(name)} characters; the bound is 1 to {_MAX_NAME}")
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise _bad(f"{shown(name)} does not consist of dtype, shape and data_offsets")
    dtype = entry["dtype"]
    if not isinstance(dtype, str):
        raise _bad(f"the dtype of {shown(name)} is not a string")
    if dtype not in DTYPES:
        raise AdapterRejectedError(
            "unsupported_dtype",
            f"{shown(name)} is {shown(dtype)}; supported are {', '.join(DTYPES)}",
        )
    shape = _integers(entry["shape"], name, "shape")
    offsets = _integers(entry["data_offsets"], name, "data_offsets")
    if not 1 <= len(shape) <= _MAX_DIMENSIONS:
        raise AdapterRejectedError(
            "shape_mismatch",
            f"{shown(name)} has shape {shown(list(shape))}; one to three dimensions are served",
        )
    if len(offsets) != 2:
        raise _bad(f"data_offsets of {shown(name)} are not two numbers")
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != wanted:
        raise _bad(
            f"{shown(name)} has {offsets[1] - offsets[0]} bytes; its shape and dtype need {wanted}"[
                :400
            ]
        )
    return TensorInfo(name, DTYPES[dtype], shape, start + offsets[0], start + offsets[1])


def _integers(value: object, name: str, field: str) -> tuple[int, ...]:
    # type() and not isinstance: true is no integer here. 2**63 bounds what an error message can
    # hold, too.
    if (
        not isinstance(value, list)
        or any(type(item) is not int for item in value)
        or (value and not 0 <= min(value) <= max(value) < 2**63)
    ):
        raise _bad(f"{field} of {shown(name)} is not a list of non-negative integers")
    return tuple(value)


def _check_cover(entries: list[TensorInfo], start: int, size: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    position = start
    for entry in entries:
        if entry.begin != position:
            problem = (
                "overlaps the tensor before it"
                if entry.begin < position
                else "leaves a gap before it"
            )
            raise _bad(f"{shown(entry.name)} {problem} (byte {entry.begin}, expected {position})")
        position = entry.end
    if position != size:
        raise _bad(
            f"the tensors end at byte {position}, the file at {size}: truncated, or stray bytes"
        )


def _bad(message: str) -> AdapterRejectedError:
    return AdapterRejectedError("bad_header", message)
