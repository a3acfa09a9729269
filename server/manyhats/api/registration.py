"""What a registration says beside the adapter itself, as JSON or as the parts of an upload."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Final

from pydantic import ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator

from manyhats.adapters.sources.address import MAX_ADDRESS, HubSource, Source, UrlSource
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


SourceText = Annotated[str, Field(min_length=1, max_length=1024)]
"""Where a version is from, in words."""


class Told(StrictModel):
    """Whether the version becomes the stable one at once, why it is registered, and what its
    trainer tells.
    """

    promote: bool | None = None
    reason: Annotated[str, Field(max_length=MAX_REASON)] = ""
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


class Described(Told):
    """The same, and where the version comes from."""

    source: SourceText | None = None


class HubField(StrictModel):
    """A repository of the Hugging Face hub (``org/name``) at a commit, 40 hex digits."""

    hub: Annotated[str, Field(max_length=200)]
    revision: Annotated[str, Field(max_length=80)]

    def source(self) -> Source:
        """The same for the service."""
        return HubSource(self.hub, self.revision)


class UrlField(StrictModel):
    """A folder on a web server (http, https) or in an object store (s3, gs) that holds
    ``adapter_config.json`` and ``adapter_model.safetensors``; ``sha256`` of the latter, in hex.
    """

    url: Annotated[str, Field(max_length=MAX_ADDRESS)]
    sha256: Annotated[str | None, Field(pattern="^[0-9a-f]{64}$")] = None

    def source(self) -> Source:
        """The same for the service."""
        return UrlSource(self.url, self.sha256)


def _source_kind(value: object) -> str:
    if isinstance(value, str):
        return "text"
    return "hub" if isinstance(value, HubField) or "hub" in _keys(value) else "url"


def _keys(value: object) -> Collection[object]:
    return value if isinstance(value, dict) else ()


SourceField = Annotated[
    Annotated[SourceText, Tag("text")]
    | Annotated[HubField, Tag("hub")]
    | Annotated[UrlField, Tag("url")],
    Discriminator(_source_kind),
]


class RegisterRequest(Told):
    """Body of ``POST /admin/adapters`` as JSON. ``path``: a folder within an allowed root; or
    ``composition``: registered adapters worn as one; or ``source``: where to fetch it from.

    Beside ``path`` and ``composition``, ``source`` is a text that is kept with the version.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"name": "pirate", "path": "/srv/adapters/pirate-7", "promote": False},
                {"name": "pirate", "source": {"hub": "org/pirate", "revision": "0" * 40}},
                {"name": "pirate", "source": {"url": "https://models.example/pirate-7"}},
                {"name": "both", "composition": {"weighted": {"pirate": 0.7, "formal": 0.3}}},
            ]
        }
    )

    name: str
    path: str | None = None
    composition: CompositionField = None
    source: SourceField | None = None

    @property
    def remote(self) -> Source | None:
        """Where to fetch the adapter from; None where it is here. Raises RequestError for two."""
        if self.source is None or isinstance(self.source, str):
            return None
        if self.path is not None or self.composition is not None:
            raise RequestError("give one of path, composition and source", param="source")
        return self.source.source()

    @property
    def label(self) -> str | None:
        """Where the version is from, in words."""
        return self.source if isinstance(self.source, str) else None


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
