"""Imports transformers and bitsandbytes without what both would bring along for nothing: on two
cores that is half of a server's start.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch


@contextmanager
def lean_imports() -> Iterator[None]:
    """What is imported meanwhile finds torch.compile switched off and some packages missing.

    bitsandbytes has its optimizers, and what it does on other devices, compiled by torch, for which
    torch imports all of its compiler. transformers' losses take SciPy's optimizers. torch asks for
    Triton, which is for GPUs alone. All three libraries do without when it is not there; what has
    been imported already, stays.
    """
    unneeded = ["scipy"] if torch.cuda.is_available() else ["scipy", "triton"]
    hidden = [name for name in unneeded if name not in sys.modules]
    compiler = torch.compile
    torch.compile = partial(compiler, disable=True)  # its own switch
    # None in sys.modules: the package cannot be found (Python's import system).
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
        torch.compile = compiler


with lean_imports():
    # The modules in which the classes are: transformers itself imports them when asked for.
    import accelerate  # noqa: F401
    import bitsandbytes  # noqa: F401
    import transformers.modeling_utils  # noqa: F401
