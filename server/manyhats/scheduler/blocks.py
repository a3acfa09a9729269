"""The paged KV cache as bookkeeping: block ids, reference counts, and reuse of equal prefixes.

A block holds the keys and values of ``block_size`` consecutive tokens. A full block whose tokens
are all computed is known by a key::

    SHA-256(parent key | base digest | adapter digest or "" | tenant | the block's token ids)

so equal keys mean equal whole prefixes under the same base, adapter and tenant; no other block is
ever shared. Texts are length-prefixed, token ids are eight bytes each, and the first block's parent
is 32 zero bytes. Blocks that nobody holds keep their content until they are needed, least recently
freed first.

A block's memory may become resident only when it is first used (pages of a CPU). So a block that
was never used is taken only while fewer than ``idle_blocks`` lie idle with content; beyond, the
oldest content gives way. What gave way so is remembered by key (the ghost entries of 2Q, Johnson
and Shasha 1994, and ARC, Megiddo and Modha 2003): a prompt that comes back for it doubles the
number, so memory grows where reuse is worth it and nowhere else.
"""

from __future__ import annotations

import struct
from hashlib import sha256

from manyhats.types import Sequence

_NO_PARENT = bytes(32)


class SchedulerStateError(RuntimeError):
    """A call that the scheduler's state does not allow: a mistake of the calling code."""


class BlockManager:
    """``num_blocks`` blocks of ``block_size`` tokens. Confined to the step loop's thread.

    Every operation costs constant Python a block that it adds or frees; nothing is hashed twice
    for one sequence. ``hit_tokens`` of ``query_tokens`` prompt tokens were found by ``match``.
    ``idle_blocks`` is where that number starts; None: all blocks, whose memory is there anyway.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        prefix_cache: bool,
        base_digest: str,
        idle_blocks: int | None = None,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"need at least one block of one token: {num_blocks} x {block_size}")
        if idle_blocks is not None and idle_blocks < 1:
            raise ValueError(f"idle_blocks must be at least 1, not {idle_blocks}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self.hit_tokens = 0
        self.query_tokens = 0
        self._base = _field(base_digest)
        self._refs = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._by_key: dict[bytes, int] = {}
        self._idle = num_blocks if idle_blocks is None else min(idle_blocks, num_blocks)
        self._unused = num_blocks  # so many, the last ones, were never used
        self._ghosts: dict[bytes, None] = {}  # keys that gave way to frugality, oldest first
        self._blank: list[int] = []  # free, used before, nothing worth keeping
        self._cached: dict[int, None] = {}  # free, content reusable, least recently freed first
        self._committed: dict[int, int] = {}  # sequence id -> its blocks that are known by key
        self._tokens = struct.Struct(f"<{block_size}q")

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, with or without reusable content."""
        return len(self._blank) + len(self._cached) + self._unused

    @property
    def num_touched(self) -> int:
        """Blocks that were ever used: those whose memory is resident. Never falls."""
        return self.num_blocks - self._unused

    @property
    def num_used(self) -> int:
        """Blocks that some sequence holds."""
        return self.num_blocks - self.num_free

    def needed(self, tokens: int) -> int:
        """Blocks for that many tokens."""
        return -(-tokens // self.block_size)

    def match(self, seq: Sequence) -> int:
        """Give the sequence, which holds no block, the longest cached prefix; return its tokens.

        Whole blocks only, and never the last token, so that there is something to compute. Nothing
        for a sequence that wants prompt log-probabilities: it must compute every position.
        Background sequences neither read nor fill the cache of prefixes, nor count.
        """
        if seq.block_ids:
            raise SchedulerStateError(f"sequence {seq.id} holds blocks already")
        if seq.background:
            return 0
        self.query_tokens += len(seq.token_ids)
        if not self.prefix_cache or seq.wants_prompt_logprobs:
            return 0
        for index in range((len(seq.token_ids) - 1) // self.block_size):
            self._hash_until(seq, index + 1)
            block = self._by_key.get(seq.block_hashes[index])
            if block is None:
                self._missed(seq.block_hashes[index])
                break
            if self._refs[block] == 0:
                del self._cached[block]
            self._refs[block] += 1
            seq.block_ids.append(block)
        self._committed[seq.id] = len(seq.block_ids)
        tokens = len(seq.block_ids) * self.block_size
        self.hit_tokens += tokens
        return tokens

    def cancel_match(self, seq: Sequence) -> None:
        """Undo the ``match`` of a sequence that cannot run yet, in the counters too."""
        if seq.background:
            self.free(seq)
            return
        self.hit_tokens -= self._committed.get(seq.id, 0) * self.block_size
        self.query_tokens -= len(seq.token_ids)
        self.free(seq)

    def allocate(self, seq: Sequence, upto: int) -> bool:
        """Give the sequence blocks for the positions below ``upto``: all, or none (False)."""
        missing = self.needed(upto) - len(seq.block_ids)
        if missing <= 0:
            return True
        if missing > self.num_free:
            return False
        for _ in range(missing):
            block = self._blank.pop() if self._blank else self._make()
            self._refs[block] = 1
            seq.block_ids.append(block)
        return True

    def commit(self, seq: Sequence, computed: int) -> None:
        """Tell that the first ``computed`` tokens are in the cache: full blocks may be reused.

        A block whose content another block holds already stays private.
        """
        full = computed // self.block_size
        if full > len(seq.block_ids) or computed > len(seq.token_ids):
            raise SchedulerStateError(f"sequence {seq.id} has no {computed} tokens in the cache")
        if not self.prefix_cache or seq.background:
            return
        done = self._committed.get(seq.id, 0)
        if full <= done:
            return
        self._hash_until(seq, full)
        for index in range(done, full):
            key, block = seq.block_hashes[index], seq.block_ids[index]
            if key not in self._by_key:
                self._by_key[key] = block
                self._keys[block] = key
        self._committed[seq.id] = full

    def free(self, seq: Sequence) -> None:
        """Let go of the sequence's blocks, the last first: a prefix is worth more than its tail."""
        for block in reversed(seq.block_ids):
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if self._keys[block] is None:
                    self._blank.append(block)
                else:
                    self._cached[block] = None
        seq.block_ids = []
        self._committed.pop(seq.id, None)

    def check_invariants(self) -> None:
        """Raise RuntimeError if the bookkeeping contradicts itself. Slow: for tests."""
        unused = range(self.num_touched, self.num_blocks)
        free = [*self._blank, *self._cached, *unused]
        if sorted(free) != [b for b in range(self.num_blocks) if self._refs[b] == 0]:
            raise RuntimeError(f"free blocks {sorted(free)} against references {self._refs}")
        known = {key: block for block, key in enumerate(self._keys) if key is not None}
        if known != self._by_key or any(self._keys[b] is not None for b in self._blank):
            raise RuntimeError("keys and blocks do not belong together")
        if any(self._keys[b] is not None for b in unused) or len(self._ghosts) > self.num_blocks:
            raise RuntimeError("an unused block has content, or too much is remembered")

    def _make(self) -> int:
        """A block, of which there is one free, though none is blank: unused, or evicted."""
        if self._unused and len(self._cached) < self._idle:
            self._unused -= 1
            if not self._unused:
                self._ghosts.clear()  # there is no choice left to learn for
            return self.num_touched - 1
        return self._evict()

    def _evict(self) -> int:
        block = next(iter(self._cached))
        del self._cached[block]
        key = self._keys[block]
        if key is None:
            raise SchedulerStateError(f"block {block} is kept without content")
        del self._by_key[key]
        self._keys[block] = None
        if self._unused:
            self._ghosts[key] = None
            if len(self._ghosts) > self.num_blocks:
                del self._ghosts[next(iter(self._ghosts))]
        return block

    def _missed(self, key: bytes) -> None:
        """A prompt asked for this block in vain: if frugality lost it, more is kept from now on."""
        if key in self._ghosts:
            del self._ghosts[key]
            self._idle = min(2 * self._idle, self.num_blocks)

    def _hash_until(self, seq: Sequence, full: int) -> None:
        """Extend ``seq.block_hashes`` to that many blocks; tokens are only ever appended."""
        hashes = seq.block_hashes
        if len(hashes) >= full:
            return
        adapter = seq.adapter.digest if seq.adapter is not None else ""
        scope = self._base + _field(adapter) + _field(seq.tenant)
        for index in range(len(hashes), full):
            parent = hashes[-1] if hashes else _NO_PARENT
            first = index * self.block_size
            tokens = self._tokens.pack(*seq.token_ids[first : first + self.block_size])
            hashes.append(sha256(parent + scope + tokens).digest())


def _field(text: str) -> bytes:
    """The text with its length before it, so that no two lists of fields read alike."""
    data = text.encode()
    return struct.pack("<I", len(data)) + data
