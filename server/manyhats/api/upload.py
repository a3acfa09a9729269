"""A multipart upload of an adapter's two files, written to its staging folder as it comes.

Nothing but one chunk of the network's size is held in memory. The order of the parts is free.
"""

from __future__ import annotations

from typing import Final

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from manyhats.adapters.names import CONFIG_NAME, WEIGHTS_NAME
from manyhats.adapters.staging import Staging
from manyhats.api.registration import TEXT_FIELDS
from manyhats.errors import RequestError

FILE_FIELDS: Final = {"config": CONFIG_NAME, "weights": WEIGHTS_NAME}
"""The parts that are files, and what they are stored as."""

_REQUIRED: Final = ("name", *FILE_FIELDS)
_FIELDS: Final = (*TEXT_FIELDS, *FILE_FIELDS)
_MAX_HEADER_BYTES: Final = 8192


class UploadReader:
    """Parses one multipart body, fed in order, by one thread at a time; writes as it parses."""

    def __init__(self, boundary: bytes, staging: Staging) -> None:
        self._staging = staging
        self._field = ""
        self._seen: set[str] = set()
        self._texts: dict[str, bytearray] = {}
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

    def finish(self) -> dict[str, str]:
        """The text fields, once everything was fed; ``name`` is among them.

        Raises RequestError for what is missing, or no UTF-8.
        """
        if not self._ended:
            raise RequestError("the multipart body ends before its closing boundary")
        for field in _REQUIRED:
            if field not in self._seen:
                raise RequestError(f"field {field!r} is missing", param=field)
        texts = {}
        for field, content in self._texts.items():
            try:
                texts[field] = content.decode()
            except UnicodeDecodeError:
                raise RequestError(f"{field} is not valid UTF-8", param=field) from None
        return texts

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
        if field in TEXT_FIELDS:
            self._texts[field] = bytearray()
        self._field = field

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field in FILE_FIELDS:
            self._staging.write(FILE_FIELDS[self._field], data[start:end])
            return
        text, bound = self._texts[self._field], TEXT_FIELDS[self._field]
        text += data[start:end]
        if len(text) > bound:
            raise RequestError(
                f"{self._field} is over the bound of {bound} bytes", param=self._field
            )

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
