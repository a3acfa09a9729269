"""Issued API keys: ``mh_<id>_<secret>``, of which only the SHA-256 digest is kept.

The id is no secret; it finds the record, so that one comparison, in constant time, decides. The
secret is 32 random bytes: nobody guesses it, and no slow hash is needed.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from typing import Final

_KEY: Final = re.compile(rb"mh_([0-9a-f]{16})_[A-Za-z0-9_-]{43}")
_NOBODYS: Final = hashlib.sha256(secrets.token_bytes(32)).hexdigest()


def new_key() -> tuple[str, str, str]:
    """(id, key, digest) of a new key; the key is to be shown once and forgotten."""
    ident = secrets.token_hex(8)
    key = f"mh_{ident}_{secrets.token_urlsafe(32)}"
    return ident, key, digest_of(key.encode())


def digest_of(key: bytes) -> str:
    """The SHA-256 of a key, in hex."""
    return hashlib.sha256(key).hexdigest()


def id_of(key: bytes) -> str | None:
    """The id that a key names, None for what is no key of ours."""
    found = _KEY.fullmatch(key)
    return found[1].decode() if found else None


def matches(digest: str | None, key: bytes) -> bool:
    """Whether ``digest`` is the key's, in constant time; None (no such key) takes as long."""
    same = hmac.compare_digest(digest or _NOBODYS, digest_of(key))
    return same and digest is not None
