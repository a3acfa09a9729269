"""The whole application over a tiny model, as ``manyhats serve`` builds it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from support.base import tiny_settings, write_base
from support.models import tiny_tokenizer

from manyhats.app import Application, build


def tiny_base(folder: Path, template: str | None = None) -> Path:
    """As ``write_base``, with a chat template if one is given."""
    write_base(folder)
    if template is not None:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def tiny_application(base: Path, home: Path, **settings: Any) -> Iterator[Application]:
    """The application over the model in ``base``, in fp32 on the CPU; closed at the end."""
    threads = torch.get_num_threads()
    made = build(tiny_settings(home, base, **settings))
    try:
        yield made
    finally:
        for close in made.closing:
            close()
        torch.set_num_threads(threads)
