"""The core types: one page of them, each field with who sets it. No tensor lives here."""

from __future__ import annotations

import enum
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from typing import Final, NewType, Protocol

from manyhats.errors import ManyhatsError

TenantId = NewType("TenantId", str)
"""Who pays and who may see. ``default`` where no tenant is configured."""

Digest = NewType("Digest", str)
"""Lower-case hex SHA-256 of an adapter version's content (configuration and weights)."""

DEFAULT_TENANT: Final = TenantId("default")
BASE_SLOT: Final = -1
"""The slot of a token that wears no adapter."""


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """An immutable adapter version, as a request is resolved to it.

    ``virtual_tokens`` come before every prompt of its requests, inside the engine alone (of an
    ensemble: the most that a member has).
    ``composition`` is set where it consists of other versions. One that was named in a request
    alone has the version 0 and is called by its members: ``weighted(a@1:0.7,b@2:0.3)``.
    """

    name: str
    version: int
    digest: Digest
    virtual_tokens: int = 0
    composition: Composition | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.version}" if self.version else self.name

    @property
    def label(self) -> str:
        """What the metrics call it: its name, or the kind of a composition named in a request."""
        if self.version or self.composition is None:
            return self.name
        return f"({self.composition.kind.value})"

    @property
    def is_ensemble(self) -> bool:
        """Whether its members answer together, each in a lane of its own."""
        return self.composition is not None and self.composition.kind is CompositionKind.ENSEMBLE

    @property
    def lanes(self) -> tuple[AdapterRef | None, ...]:
        """What each lane of a sequence wears (None: the base): a lane for each member of an
        ensemble, else one.
        """
        whole = self.composition
        if whole is None or not self.is_ensemble:
            return (self,)
        return tuple(member if member.digest else None for member in whole.members)


class CompositionKind(enum.Enum):
    """How several adapters answer as one; ``adapters/compose.py`` defines the arithmetic of those
    that are worn as one, ``engine/ensembles.py`` that of ensembles.
    """

    STACK = "stack"
    WEIGHTED = "weighted"
    ENSEMBLE = "ensemble"


@dataclass(frozen=True, slots=True)
class Composition:
    """Several adapter versions as one. ``weights``: one a member where they were given, else none.

    A stack's members are in the order in which they act, the others' in that of their digests. An
    ensemble's may be compositions themselves, no ensembles, and one may be the bare base, which has
    no digest.
    """

    kind: CompositionKind
    members: tuple[AdapterRef, ...]
    weights: tuple[float, ...] = ()


class Priority(enum.Enum):
    """Who goes first. Background work (evaluations, probes, comparisons) runs in what live requests
    leave: ``scheduler/background.py`` says how.
    """

    NORMAL = "normal"
    BACKGROUND = "background"


class GrammarKind(enum.Enum):
    """What constrains the output."""

    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """A valid output constraint. ``schema`` is the JSON text of the schema, if any."""

    kind: GrammarKind
    schema: str | None = None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence is sampled. Set by the API after validation; never changed.

    ``seed`` is always set (the API draws one where the caller gave none). ``logprobs`` is the
    number of alternatives wanted beside the chosen token (0: the chosen one's alone), None: none at
    all; ``prompt_logprobs`` likewise for the prompt's tokens. Log-probabilities are of the model's
    own distribution, before temperature, penalties, bias and filters.
    """

    max_tokens: int
    seed: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: GrammarSpec | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request as the API hands it to the engine: bounded, validated, resolved, tokenized.

    ``params`` holds one entry a choice (``n`` of them, seeds differing). ``adapter`` None: the bare
    base. ``arrival`` is in seconds of the monotonic clock, and so is ``deadline``, at which the
    request ends with an error unless it is done; None: never. ``urgency`` orders a tenant's own
    waiting requests, the highest first. Where ``prompt_logprobs`` asks for scores, it is the
    prompt's tokens from the index ``scores_from`` on (at least 1) that get them. With
    ``keeps_logits`` those of the answers are kept for a comparison that is to come.
    """

    request_id: str
    tenant: TenantId
    prompt_token_ids: tuple[int, ...]
    params: tuple[SamplingParams, ...]
    adapter: AdapterRef | None
    arrival: float
    priority: Priority = Priority.NORMAL
    scores_from: int = 1
    deadline: float | None = None
    urgency: int = 0
    keeps_logits: bool = False


class KeptLogits(Protocol):
    """The logits that an answer was drawn from, as the engine keeps them: of any version, [tokens,
    V] of the model's dtype, on its device.
    """

    def __len__(self) -> int:
        """Tokens of the answer that have a row."""


class FinishReason(enum.Enum):
    """Why a sequence ended. ``value`` is what the API shows (ERROR and ABORT never reach a
    success).
    """

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its log-probability, and the most likely alternatives (best first)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """What one step added to one choice of a request. Sent by the engine, consumed by the API.

    ``text`` holds only what can no longer change (a possible start of a stop string or of a UTF-8
    sequence is held back), so ``token_ids`` and ``text`` of a single delta need not correspond;
    their sums do. ``prompt_logprobs`` comes once, with the first delta of a choice that asked for
    it; its first entry is None. ``cached_tokens`` is how many prompt tokens the prefix cache
    served. ``admitted_at`` comes with a choice's first delta: when its sequence first left the
    queue (seconds, monotonic). ``kept`` comes with the last delta of a choice whose request
    ``keeps_logits``: for ``CompareRequest``, of no other use, and of memory as long as it is held.
    """

    request_id: str
    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    error: ManyhatsError | None = None
    cached_tokens: int = 0
    admitted_at: float | None = None
    kept: KeptLogits | None = None


class SequenceStatus(enum.Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of one request while the engine works on it. Confined to the step loop's thread.

    Set at submission: ``id`` (unique, increasing), ``request_id``, ``index``, ``tenant``,
    ``params``, ``adapter``, ``arrival``, ``priority``, ``deadline``, ``urgency``, ``keeps_logits``,
    ``scores_from`` (an index into the prompt's own tokens), ``prompt_len``, ``token_ids`` (a
    placeholder for each of the adapter's virtual tokens, then a copy of the prompt, both counted by
    ``prompt_len``; the loop appends outputs). Set by the scheduler: ``status``, ``slot`` (the
    adapter's slot while admitted, BASE_SLOT for the base), ``num_computed`` (tokens whose keys and
    values are in the cache once the scheduled step has run), ``num_cached`` (of the prompt, served
    by the prefix cache at the last admission), ``preemptions``. Set by the block manager:
    ``block_ids`` (cache blocks in order), ``block_hashes`` (chain of full blocks). Set by the loop:
    ``admitted_at`` (first time), ``first_token_at``, ``last_token_at`` (seconds, monotonic).

    A choice of an ensemble has ``lanes``, one a member, which are computed side by side: each a
    sequence with tokens, blocks, slot and lease of its own and ``whole`` pointing back. The choice
    itself then holds the prompt and the outputs alone; it waits, runs and ends with all its lanes.
    """

    id: int
    request_id: str
    index: int
    tenant: TenantId
    params: SamplingParams
    adapter: AdapterRef | None
    arrival: float
    prompt_len: int
    token_ids: list[int]
    priority: Priority = Priority.NORMAL
    scores_from: int = 1
    status: SequenceStatus = SequenceStatus.WAITING
    slot: int = BASE_SLOT
    num_computed: int = 0
    num_cached: int = 0
    preemptions: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    first_token_at: float | None = None
    last_token_at: float | None = None
    admitted_at: float | None = None
    deadline: float | None = None
    urgency: int = 0
    keeps_logits: bool = False
    lanes: tuple[Sequence, ...] = ()
    whole: Sequence | None = None

    @property
    def computed(self) -> tuple[Sequence, ...]:
        """What the model computes for it: its lanes, or itself."""
        return self.lanes or (self,)

    @property
    def ticket(self) -> int:
        """Its age: the id, of a lane that of the whole, so that all lanes are of one age."""
        return self.id if self.whole is None else self.whole.id

    @property
    def left(self) -> int:
        """Known tokens that are not computed yet."""
        return len(self.token_ids) - self.num_computed

    @property
    def output_len(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.prompt_len

    @property
    def background(self) -> bool:
        """Whether it only runs in what live requests leave."""
        return self.priority is Priority.BACKGROUND

    @property
    def virtual_tokens(self) -> int:
        """Placeholders before the prompt's own tokens."""
        return self.adapter.virtual_tokens if self.adapter is not None and not self.lanes else 0

    @property
    def cached_prompt_tokens(self) -> int:
        """Tokens of the prompt itself that the prefix cache served at the last admission."""
        return max(0, self.num_cached - self.virtual_tokens)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether every prompt position's logits are needed (so no cached prefix can serve it)."""
        return self.params.prompt_logprobs is not None


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """A sequence's share of one step: ``count`` tokens from position ``start`` on.

    ``samples`` is true when the step reaches the end of the known tokens, so that a token is drawn.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step's work, in the order in which its tokens are packed. Made by the scheduler."""

    items: SequenceABC[ScheduledSequence]
    preempted: SequenceABC[Sequence] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens in the packed batch."""
        return sum(item.count for item in self.items)
