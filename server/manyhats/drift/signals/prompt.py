"""Signals of the prompt that cost nothing: its length and its script."""

from __future__ import annotations

from manyhats.drift.signals import Values
from manyhats.drift.signals.finished import Finished
from manyhats.drift.signals.script import main_script


def prompt_signals(done: Finished, text: str) -> Values:
    """The prompt's signals; ``text`` is the prompt decoded."""
    return {"prompt_tokens": float(len(done.prompt_token_ids)), "script": main_script(text)}
