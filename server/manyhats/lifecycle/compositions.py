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
BASE_DIGEST: Final = Digest("")
"""That of the bare base as a member of an ensemble."""
MAX_WEIGHT: Final = 100.0
"""Bound of a weight, either way."""


@dataclass(frozen=True, slots=True)
class NamedComposition:
    """A composition as it was asked for: ``names`` in order, one of ``weights`` each or none.

    Weights of an ensemble are over 0; they are relative to each other.
    """

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
        where = f".{name[:140]}" if wanted.weights else f"[{index}]"
        param = f"{field}.{wanted.kind.value}{where}"
        members.append(_member(wanted.kind, name, resolve, param, members))
    return composed(wanted.kind, members, wanted.weights)


def composed(
    kind: CompositionKind, members: Sequence[AdapterRef], weights: Sequence[float]
) -> AdapterRef:
    """What ``members``, in the order in which they were named, are called together."""
    order = list(range(len(members)))
    if kind is not CompositionKind.STACK:
        order.sort(key=lambda i: members[i].digest)
    if weights:
        pairs = zip(members, weights, strict=True)
        shown = [f"{m}:{repr(float(w)).removesuffix('.0')}" for m, w in pairs]
        content: list[object] = [[members[i].digest, float(weights[i])] for i in order]
    else:
        shown = [str(member) for member in members]
        content = [members[i].digest for i in order]
    virtual = [member.virtual_tokens for member in members]
    text = json.dumps({kind.value: content}, separators=(",", ":"))
    return AdapterRef(
        name=f"{kind.value}({','.join(shown)})",
        version=0,
        digest=Digest(hashlib.sha256(text.encode()).hexdigest()),
        virtual_tokens=max(virtual) if kind is CompositionKind.ENSEMBLE else sum(virtual),
        composition=Composition(
            kind,
            tuple(members[i] for i in order),
            tuple(float(weights[i]) for i in order) if weights else (),
        ),
    )


def shown(composition: Composition) -> dict[str, Any]:
    """As a request names it, with versions."""
    names = [str(member) for member in composition.members]
    if not composition.weights:
        return {composition.kind.value: names}
    return {composition.kind.value: dict(zip(names, composition.weights, strict=True))}


def _member(
    kind: CompositionKind,
    name: str,
    resolve: Callable[[str], AdapterRef | None],
    param: str,
    before: Sequence[AdapterRef],
) -> AdapterRef:
    try:
        ref = resolve(name)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"{param}: {error.message}", param=param) from error
    if ref is None and kind is CompositionKind.ENSEMBLE:
        ref = AdapterRef(name, 0, BASE_DIGEST)
    if ref is None:
        raise RequestError(f"{param}: {name!r} is the base model, no adapter", param=param)
    whole = ref.composition
    if whole is not None and kind is not CompositionKind.ENSEMBLE:
        raise RequestError(f"{param}: {ref} is a composition itself; name its members", param=param)
    if whole is not None and whole.kind is CompositionKind.ENSEMBLE:
        raise RequestError(f"{param}: {ref} is an ensemble itself; name its members", param=param)
    if any(ref.digest == other.digest for other in before):
        raise RequestError(f"{param}: {ref} is named twice", param=param)
    return ref
