"""The whole application over a tiny model, as ``manyhats serve`` builds it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from support.models import tiny_model, tiny_tokenizer

from manyhats.app import Application, build
from manyhats.config import Settings


def tiny_base(folder: Path, template: str | None = None) -> Path:
    """A small Llama and its tokenizer, with a chat template if one is given, in ``folder``."""
    tokenizer = tiny_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    tiny_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def tiny_application(base: Path, home: Path, **settings: Any) -> Iterator[Application]:
    """The application over the model in ``base``, in fp32 on the CPU; closed at the end."""
    threads = torch.get_num_threads()
    plain = {"device": "cpu", "dtype": "fp32", "quantization": "none", "kernels": "torch"}
    made = build(Settings(home=home, model=str(base), kv_cache_mb=16, **plain, **settings))
    try:
        yield made
    finally:
        for close in made.closing:
            close()
        torch.set_num_threads(threads)
