"""A multipart upload of an adapter's two files, written to its staging folder as it comes.

Nothing but one chunk of the network's size is held in memory. The order of the parts is free.
"""

from __future__ import annotations

from typing import Final

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from manyhats.adapters.files import CONFIG_NAME, WEIGHTS_NAME
from manyhats.adapters.store import Staging
from manyhats.errors import RequestError

FILE_FIELDS: Final = {"config": CONFIG_NAME, "weights": WEIGHTS_NAME}
"""The parts that are files, and what they are stored as."""

_NAME_FIELD: Final = "name"
_FIELDS: Final = (_NAME_FIELD, *FILE_FIELDS)
_MAX_NAME_BYTES: Final = 1024
_MAX_HEADER_BYTES: Final = 8192


class UploadReader:
    """Parses one multipart body, fed in order, by one thread at a time; writes as it parses."""

    def __init__(self, boundary: bytes, staging: Staging) -> None:
        self._staging = staging
        self._field = ""
        self._seen: set[str] = set()
        self._name = bytearray()
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._disposition = b""
        self._header_bytes = 0
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_header_field": self._header_field,
                "on_header_value": self._header_content,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._part_data,
                "on_end": self._end,
            },
        )

    def feed(self, chunk: bytes) -> None:
        """Parse and store the next bytes of the body.

        Raises RequestError (not multipart; an unknown, repeated or overlong field),
        AdapterRejectedError ``too_large``, ServiceError (the disk).
        """
        try:
            self._parser.write(chunk)
        except FormParserError as exc:
            raise RequestError(f"the body is not valid multipart/form-data: {exc}") from exc

    def finish(self) -> str:
        """The ``name`` field, once everything was fed. Raises RequestError for what is missing."""
        if not self._ended:
            raise RequestError("the multipart body ends before its closing boundary")
        for field in _FIELDS:
            if field not in self._seen:
                raise RequestError(f"field {field!r} is missing", param=field)
        try:
            return self._name.decode()
        except UnicodeDecodeError:
            raise RequestError("name is not valid UTF-8", param="name") from None

    def _part_begin(self) -> None:
        self._disposition = b""
        self._header_bytes = 0

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header_name += data[start:end]

    def _header_content(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header_value += data[start:end]

    def _count_header(self, count: int) -> None:
        self._header_bytes += count
        if self._header_bytes > _MAX_HEADER_BYTES:
            raise RequestError(f"a part's headers are over the bound of {_MAX_HEADER_BYTES} bytes")

    def _header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        field = options.get(b"name", b"").decode("utf-8", "replace")
        if field not in _FIELDS:
            takes = ", ".join(_FIELDS)
            raise RequestError(
                f"unknown field {field[:100]!r}; the upload takes {takes}", param=field[:100]
            )
        if field in self._seen:
            raise RequestError(f"field {field!r} comes twice", param=field)
        self._seen.add(field)
        self._field = field

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field in FILE_FIELDS:
            self._staging.write(FILE_FIELDS[self._field], data[start:end])
            return
        self._name += data[start:end]
        if len(self._name) > _MAX_NAME_BYTES:
            raise RequestError(f"name is over the bound of {_MAX_NAME_BYTES} bytes", param="name")

    def _end(self) -> None:
        self._ended = True


def boundary_of(request: Request) -> bytes:
    """The boundary that the content type names. Raises RequestError."""
    _, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 70:
        raise RequestError(
            "content-type: multipart/form-data needs a boundary of 1 to 70 characters",
            param="content-type",
        )
    return boundary
