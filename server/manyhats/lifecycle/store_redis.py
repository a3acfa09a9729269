"""The registry in Redis, shared by replicas. A write is one Lua script: all or nothing.

Keys of one base, all under ``{manyhats:1:registry:<base>}:`` (the 1 is the format of the keyspace,
the braces keep them on one node of a cluster): ``documents``, a hash from name to JSON; ``texts``,
one from key to text; ``audit``, a stream whose id ``<n>-0`` is entry n; ``audit-names``, a sorted
set of ``<name>\\0<n>``, by which a name's entries are found; ``head``, ``<n>:<hash>`` of the newest
entry; ``key``. Who writes also publishes n to the channel ``wake``.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Final, TypeVar

import redis

from manyhats.errors import ServiceError
from manyhats.lifecycle.audit import AuditEntry, canonical
from manyhats.lifecycle.store import Documents, Dump, Head, StaleHeadError, Texts
from manyhats.tenancy.redis_client import connect

_T = TypeVar("_T")
_LOAD_TIMEOUT_S: Final = 120.0
_DIGITS: Final = 16
_BATCH: Final = 500
_WRITE: Final = """
local head = redis.call('GET', KEYS[1]) or ARGV[1]
if head == ARGV[2] then return 1 end
if head ~= ARGV[3] then return 0 end
local function set(key, first, last)
  for i = first, last, 2 do redis.call('HSET', key, ARGV[i], ARGV[i + 1]) end
end
local texts, gone = 10 + 2 * ARGV[8], 10 + 2 * (ARGV[8] + ARGV[9])
set(KEYS[2], 10, texts - 1)
set(KEYS[5], texts, gone - 1)
for i = gone, #ARGV do redis.call('HDEL', KEYS[5], ARGV[i]) end
redis.call('XADD', KEYS[3], ARGV[4] .. '-0', 'entry', ARGV[5])
redis.call('ZADD', KEYS[4], 0, ARGV[6])
redis.call('SET', KEYS[1], ARGV[2])
redis.call('PUBLISH', ARGV[7], ARGV[4])
return 1
"""


class RedisRegistryStore:
    """Implements ``RegistryStore`` for the base ``base`` in the Redis at ``url``.

    Raises ConfigError for a bad ``url``, ServiceError where nothing answers there.
    """

    shared = True

    def __init__(self, url: str, base: str) -> None:
        prefix = f"{{manyhats:1:registry:{base}}}:"
        self._head, self._documents, self._texts, self._audit, self._names, self._wake, own = (
            prefix + n
            for n in ("head", "documents", "texts", "audit", "audit-names", "wake", "key")
        )
        self._redis = connect(url)
        self._slow = connect(url, _LOAD_TIMEOUT_S)  # all of a large registry takes its time
        self._script = self._redis.register_script(_WRITE)
        self._listening = threading.Lock()
        self._pubsub: Any = None
        self._key_name = own

        def key() -> bytes:
            self._redis.set(own, secrets.token_bytes(32).hex(), nx=True)
            return bytes.fromhex(self._redis.get(own))

        self._key = _known(key)

    @property
    def key(self) -> bytes:
        """See RegistryStore."""
        return self._key

    def head(self) -> Head:
        """See RegistryStore. Raises ServiceError too where another registry lies there now."""
        return _known(lambda: self._checked(*self._redis.mget(self._head, self._key_name)))

    def read(self) -> tuple[Head, Documents]:
        """See RegistryStore."""

        def run() -> tuple[Head, Documents]:
            with self._slow.pipeline(transaction=True) as pipe:
                pipe.mget(self._head, self._key_name).hgetall(self._documents)
                ends, documents = pipe.execute()
            return self._checked(*ends), documents

        return _known(run)

    def read_names(self, names: Sequence[str]) -> tuple[Head, Documents]:
        """See RegistryStore."""

        def run() -> tuple[Head, Documents]:
            with self._redis.pipeline(transaction=True) as pipe:
                pipe.mget(self._head, self._key_name)
                if names:
                    pipe.hmget(self._documents, list(names))
                ends, *texts = pipe.execute()
            found = zip(names, texts[0] if texts else (), strict=True)
            return self._checked(*ends), {name: text for name, text in found if text is not None}

        return _known(run)

    def text(self, key: str) -> str | None:
        """See RegistryStore."""
        found: str | None = _known(lambda: self._slow.hget(self._texts, key))
        return found

    def write(self, entry: AuditEntry, documents: Documents, texts: Texts | None = None) -> None:
        """See RegistryStore."""
        kept = {key: text for key, text in (texts or {}).items() if text is not None}
        head, before = Head.of(entry), Head(entry.seq - 1, entry.previous)
        arguments = [_end(Head()), _end(head), _end(before), entry.seq, canonical(entry.shown())]
        arguments += [_member(entry.name, entry.seq), self._wake, len(documents), len(kept)]
        for key, text in (*documents.items(), *kept.items()):
            arguments += [key, text]
        arguments += [key for key, text in (texts or {}).items() if text is None]
        keys = [self._head, self._documents, self._audit, self._names, self._texts]
        if not _known(lambda: self._script(keys=keys, args=arguments)):
            raise StaleHeadError

    def audit(self, *, name: str | None, after: int, limit: int) -> Sequence[AuditEntry]:
        """See RegistryStore."""
        if name is None:
            rows = _known(
                lambda: self._redis.xrange(self._audit, min=f"{after + 1}-0", count=limit)
            )
            return tuple(_entry(fields) for _, fields in rows)

        def run() -> tuple[AuditEntry, ...]:
            first, end = f"[{_member(name, after + 1)}", f"({name}\1"
            members = self._redis.zrangebylex(self._names, first, end, start=0, num=limit)
            with self._redis.pipeline(transaction=False) as pipe:
                for member in members:
                    ident = f"{int(member.rsplit(chr(0), 1)[1])}-0"
                    pipe.xrange(self._audit, min=ident, max=ident)
                return tuple(_entry(fields) for rows in pipe.execute() for _, fields in rows)

        return _known(run)

    def wait(self, timeout_s: float) -> None:
        """See RegistryStore."""
        with self._listening:
            try:
                if self._pubsub is None:
                    self._pubsub = self._redis.pubsub(ignore_subscribe_messages=True)
                    self._pubsub.subscribe(self._wake)
                    return  # what was written before one listened is not told
                self._pubsub.get_message(timeout=timeout_s)
            except redis.RedisError as exc:
                self._hang_up()
                raise ServiceError(f"the shared registry (Redis) failed: {exc}") from exc

    def dump(self) -> Dump:
        """See RegistryStore."""

        def run() -> Dump:
            with self._slow.pipeline(transaction=True) as pipe:
                pipe.hgetall(self._documents).hgetall(self._texts)
                pipe.xrange(self._audit).get(self._key_name)
                documents, texts, rows, key = pipe.execute()
            entries = tuple(_entry(fields) for _, fields in rows)
            return Dump(bytes.fromhex(key), documents, entries, texts)

        return _known(run)

    def load(self, dump: Dump) -> None:
        """See RegistryStore."""

        def run() -> None:
            with self._slow.pipeline(transaction=True) as pipe:
                pipe.delete(self._head, self._documents, self._texts, self._audit, self._names)
                pipe.set(self._key_name, dump.key.hex())
                for key, of in ((self._documents, dump.documents), (self._texts, dump.texts)):
                    for some in _batches(of.items()):
                        pipe.hset(key, mapping=dict(some))
                for entry in dump.entries:
                    text = canonical(entry.shown())
                    pipe.xadd(self._audit, {"entry": text}, id=f"{entry.seq}-0")
                for part in _batches(dump.entries):
                    pipe.zadd(self._names, {_member(e.name, e.seq): 0 for e in part})
                if dump.entries:
                    pipe.set(self._head, _end(Head.of(dump.entries[-1])))
                pipe.publish(self._wake, len(dump.entries))
                pipe.execute()

        _known(run)
        self._key = dump.key

    def close(self) -> None:
        """See RegistryStore."""
        with self._listening:
            self._hang_up()
        self._redis.close()
        self._slow.close()

    def _hang_up(self) -> None:
        pubsub, self._pubsub = self._pubsub, None
        if pubsub is not None:
            pubsub.close()

    def _checked(self, head: str | None, key: str | None) -> Head:
        """The head, if this is still the registry that was opened.

        An empty Redis in its place would look like a registry whose every adapter was deleted.
        """
        if key != self._key.hex():
            raise ServiceError(
                "the shared registry (Redis) holds another registry than the one this server was "
                "started with, or lost it: restore it from a backup, then start the servers again"
            )
        if head is None:
            return Head()
        seq, _, digest = head.partition(":")
        return Head(int(seq), digest)


def _known(work: Callable[[], _T]) -> _T:
    try:
        return work()
    except redis.RedisError as exc:
        raise ServiceError(f"the shared registry (Redis) failed: {exc}") from exc


def _batches(items: Iterable[_T]) -> Iterator[list[_T]]:
    left = iter(items)
    while some := list(islice(left, _BATCH)):
        yield some


def _end(head: Head) -> str:
    return f"{head.seq}:{head.hash}"


def _member(name: str, seq: int) -> str:
    return f"{name}\0{seq:0{_DIGITS}}"


def _entry(fields: Any) -> AuditEntry:
    return AuditEntry(**json.loads(fields["entry"]))
