"""What a registration says beside the adapter itself, as JSON or as the parts of an upload."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import Field, ValidationError, field_validator

from manyhats.api.administration import cause
from manyhats.api.auth import Principal
from manyhats.api.body import parse_json
from manyhats.api.fields import CompositionField
from manyhats.api.handlers import describe_validation
from manyhats.api.schemas import StrictModel
from manyhats.errors import RequestError
from manyhats.lifecycle.audit import MAX_REASON
from manyhats.lifecycle.evaluation.probes import MAX_CHARS
from manyhats.lifecycle.records import Registration

MAX_METADATA_CHARS: Final = 16 << 10
"""Bound of ``metadata``, characters of all keys and values."""

TEXT_FIELDS: Final = {
    "name": 1024,
    "promote": 16,
    "reason": 4 * MAX_REASON,
    "source": 4096,
    "revision": 1024,
    "metadata": 4 * MAX_METADATA_CHARS,
    "evaluation": 4 * MAX_CHARS,
}
"""The parts of an upload that are text, and the bound of each, bytes."""


class Described(StrictModel):
    """Whether the version becomes the stable one at once, why it is registered, where it comes
    from, and what its trainer tells.
    """

    promote: bool | None = None
    reason: Annotated[str, Field(max_length=MAX_REASON)] = ""
    source: Annotated[str | None, Field(min_length=1, max_length=1024)] = None
    revision: Annotated[str, Field(max_length=256)] = ""
    metadata: Annotated[dict[str, str], Field(max_length=64)] = Field(default_factory=dict)

    @field_validator("metadata")
    @classmethod
    def _bounded(cls, value: dict[str, str]) -> dict[str, str]:
        if sum(len(k) + len(v) for k, v in value.items()) > MAX_METADATA_CHARS:
            raise ValueError(f"at most {MAX_METADATA_CHARS} characters")
        return value

    def registration(self, caller: Principal) -> Registration:
        """The same for the service."""
        return Registration(self.revision, self.metadata, self.promote, cause(caller, self.reason))


class RegisterRequest(Described):
    """Body of ``POST /admin/adapters`` as JSON. ``path``: a folder within an allowed root; or
    ``composition``: registered adapters worn as one.
    """

    name: str
    path: str | None = None
    composition: CompositionField = None


def described(texts: Mapping[str, str]) -> Described:
    """The text parts of an upload: ``promote`` is true or false, ``metadata`` a JSON object.

    Raises RequestError naming the part.
    """
    values: dict[str, Any] = dict(texts)
    for field in {"promote", "metadata"} & set(values):
        try:
            values[field] = parse_json(values[field].encode())
        except RequestError as exc:
            raise RequestError(f"{field}: {exc.message}", param=field) from None
    try:
        return Described.model_validate(values)
    except ValidationError as error:
        raise describe_validation(error.errors(include_url=False, include_input=False)) from None
