"""Imports transformers and bitsandbytes without what both would bring along for nothing, which
takes seconds of every start.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch


@contextmanager
def lean_imports() -> Iterator[None]:
    """What is imported meanwhile finds torch.compile switched off and, without a GPU, no Triton.

    bitsandbytes has its optimizers, and what it does on other devices, compiled by torch, for which
    torch imports all of its compiler. torch asks for Triton, which is for GPUs alone. Both do
    without when it is not there; what has been imported already, stays.
    """
    modules: dict[str, Any] = sys.modules
    hidden = [] if torch.cuda.is_available() or "triton" in modules else ["triton"]
    compiler = torch.compile
    vars(torch)["compile"] = partial(compiler, disable=True)  # its own switch
    modules.update(dict.fromkeys(hidden))  # None: not to be found (Python's import system)
    try:
        yield
    finally:
        for name in hidden:
            modules.pop(name, None)
        vars(torch)["compile"] = compiler


with lean_imports():
    # The modules in which the classes are: transformers itself imports them when asked for.
    import accelerate  # noqa: F401
    import bitsandbytes  # noqa: F401
    import transformers.modeling_utils  # noqa: F401
