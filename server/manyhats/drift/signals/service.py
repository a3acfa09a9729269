"""Signals of the service: errors, and how long the answer took.

Latencies follow the load as much as the adapter: a policy names them among its signals or does not.
"""

from __future__ import annotations

from manyhats.drift.signals import Values
from manyhats.drift.signals.finished import Ending, Finished


def service_signals(done: Finished) -> Values:
    """The service's signals."""
    values: dict[str, float | str] = {
        "error": float(done.ending is Ending.ERROR),
        "load_failure": float(done.load_failed),
    }
    if done.ttft_s is not None:
        values["ttft_seconds"] = done.ttft_s
    if done.inter_token_s is not None:
        values["inter_token_seconds"] = done.inter_token_s
    return values
