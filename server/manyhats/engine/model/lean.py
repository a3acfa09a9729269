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
    """What is imported meanwhile finds torch.compile switched off, no SciPy and, without a GPU, no
    Triton.

    bitsandbytes has its optimizers, and what it does on other devices, compiled by torch.
    transformers' losses of object detection import SciPy's optimizers. torch's compiler, which
    transformers imports whatever is asked of it, asks for Triton, which is for GPUs alone: so it is
    to be imported here. All do without; what has been imported already, stays.
    """
    modules: dict[str, Any] = sys.modules
    wanted = {"triton"} if torch.cuda.is_available() else set()
    hidden = {"triton", "scipy"} - wanted - modules.keys()
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
    import transformers.masking_utils
    import transformers.modeling_utils  # noqa: F401
