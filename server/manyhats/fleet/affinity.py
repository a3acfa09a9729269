"""Which replica should answer a request: the one that most likely has its adapter resident.

Rendezvous hashing (Thaler and Ravishankar, "Using name-based mappings to increase hit rates",
1998): every router ranks the replicas by a hash of (adapter, replica). No state is shared, all
routers agree, and when a replica comes or goes only the adapters that it gains or had move.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import orjson

GENERATIONS = frozenset({"/v1/completions", "/v1/chat/completions"})
"""The routes whose requests wear an adapter, and that may be sent again while nothing was heard."""


def ranking(key: str, replicas: Iterable[str]) -> list[str]:
    """The replicas from the most to the least wanted for ``key``; the same for any order given."""
    return sorted(set(replicas), key=lambda replica: _weight(key, replica), reverse=True)


def adapter_key(path: str, body: bytes, base: str) -> str:
    """What a request wears: its ``model``, and its ``adapter`` where it composes several.

    Empty for the base (``base`` is its id), which every replica has, and for anything that is no
    generation or no JSON: the server says what is wrong with it.
    """
    if path not in GENERATIONS:
        return ""
    try:
        asked: Any = orjson.loads(body)
    except orjson.JSONDecodeError:
        return ""
    if not isinstance(asked, dict):
        return ""
    model, composed = asked.get("model"), asked.get("adapter")
    if composed is not None:
        return orjson.dumps([model, composed], option=orjson.OPT_SORT_KEYS).decode()
    return model if isinstance(model, str) and model != base else ""


def may_repeat(method: str, path: str) -> bool:
    """Whether a request of which nothing was heard may be sent to another replica.

    Reads, and generations, which change nothing but the usage of what was computed.
    """
    return method in ("GET", "HEAD") or path in GENERATIONS


def _weight(key: str, replica: str) -> bytes:
    # The key's length first: no two pairs may have the same bytes.
    text = f"{len(key)}:{key}{replica}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()
