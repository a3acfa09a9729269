"""Compositions by name: what a request or a registration asks for, resolved to versions.

The digest is of the members' digests and weights alone, so that the same composition is the same
adapter to the caches and slots, whatever it is called.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from manyhats.errors import ModelNotFoundError, RequestError
from manyhats.types import AdapterRef, Composition, CompositionKind, Digest

MAX_MEMBERS: Final = 8
"""Adapters in one composition."""
MAX_WEIGHT: Final = 100.0
"""Bound of a weight, either way."""


@dataclass(frozen=True, slots=True)
class NamedComposition:
    """A composition as it was asked for: ``names`` in order, one of ``weights`` each or none."""

    kind: CompositionKind
    names: tuple[str, ...]
    weights: tuple[float, ...] = ()


def resolve_composition(
    wanted: NamedComposition, resolve: Callable[[str], AdapterRef | None], field: str
) -> AdapterRef:
    """The composition that ``wanted`` means now, pinned to versions, with the version 0.

    ``resolve`` is the directory's, for the tenant who asks; ``field`` is where the request has the
    composition. Raises ModelNotFoundError and RequestError, naming the member's own field.
    """
    members: list[AdapterRef] = []
    for index, name in enumerate(wanted.names):
        where = f"[{index}]" if wanted.kind is CompositionKind.STACK else f".{name[:140]}"
        members.append(_member(name, resolve, f"{field}.{wanted.kind.value}{where}", members))
    return composed(wanted.kind, members, wanted.weights)


def composed(
    kind: CompositionKind, members: Sequence[AdapterRef], weights: Sequence[float]
) -> AdapterRef:
    """What ``members``, in the order in which they were named, are called together."""
    if kind is CompositionKind.STACK:
        shown = [str(member) for member in members]
        order = list(range(len(members)))
        content: list[object] = [member.digest for member in members]
    else:
        pairs = zip(members, weights, strict=True)
        shown = [f"{m}:{repr(float(w)).removesuffix('.0')}" for m, w in pairs]
        order = sorted(range(len(members)), key=lambda i: members[i].digest)
        content = [[members[i].digest, float(weights[i])] for i in order]
    text = json.dumps({kind.value: content}, separators=(",", ":"))
    return AdapterRef(
        name=f"{kind.value}({','.join(shown)})",
        version=0,
        digest=Digest(hashlib.sha256(text.encode()).hexdigest()),
        virtual_tokens=sum(member.virtual_tokens for member in members),
        composition=Composition(
            kind,
            tuple(members[i] for i in order),
            tuple(float(weights[i]) for i in order) if weights else (),
        ),
    )


def to_json(composition: Composition) -> str:
    """The stored form: members pinned to their versions."""
    weights = composition.weights or (None,) * len(composition.members)
    rows = [
        [m.name, m.version, m.digest, m.virtual_tokens, weight]
        for m, weight in zip(composition.members, weights, strict=True)
    ]
    return json.dumps({"kind": composition.kind.value, "members": rows}, separators=(",", ":"))


def from_json(text: str) -> Composition:
    """What ``to_json`` was given."""
    stored = json.loads(text)
    kind = CompositionKind(stored["kind"])
    members = tuple(
        AdapterRef(name, version, Digest(digest), virtual)
        for name, version, digest, virtual, _ in stored["members"]
    )
    weighted = kind is CompositionKind.WEIGHTED
    return Composition(kind, members, tuple(r[4] for r in stored["members"]) if weighted else ())


def shown(composition: Composition) -> dict[str, Any]:
    """As a request names it, with versions."""
    names = [str(member) for member in composition.members]
    if composition.kind is CompositionKind.STACK:
        return {composition.kind.value: names}
    return {composition.kind.value: dict(zip(names, composition.weights, strict=True))}


def _member(
    name: str,
    resolve: Callable[[str], AdapterRef | None],
    param: str,
    before: Sequence[AdapterRef],
) -> AdapterRef:
    try:
        ref = resolve(name)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"{param}: {error.message}", param=param) from error
    if ref is None:
        raise RequestError(f"{param}: {name!r} is the base model, no adapter", param=param)
    if ref.composition is not None:
        raise RequestError(f"{param}: {ref} is a composition itself; name its members", param=param)
    if any(ref.digest == other.digest for other in before):
        raise RequestError(f"{param}: {ref} is named twice", param=param)
    return ref
