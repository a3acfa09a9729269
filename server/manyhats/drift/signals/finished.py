"""A finished request as the API tells of it: the raw material of the signals."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from manyhats.types import AdapterRef, KeptLogits, TenantId


class Ending(enum.StrEnum):
    """How a choice ended: by itself, at its bound, or by an error of the server's."""

    STOP = "stop"
    LENGTH = "length"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finished:
    """One choice of a request that an adapter version answered.

    ``logprobs`` of the tokens, where the request asked for them. ``ttft_s`` from arrival to the
    first token and ``inter_token_s`` the mean between two, where there were as many.
    ``json_asked``: a JSON format was. ``load_failed``: the error is that the adapter could not be
    loaded. ``kept``: what the engine kept of the answer, to compare it with other versions'.
    """

    request_id: str
    tenant: TenantId
    adapter: AdapterRef
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    ending: Ending
    logprobs: tuple[float, ...] = ()
    ttft_s: float | None = None
    inter_token_s: float | None = None
    json_asked: bool = False
    load_failed: bool = False
    kept: KeptLogits | None = None
