"""Imports transformers and bitsandbytes without what both would bring along for nothing, which
takes seconds of every start.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Final

import torch

_MARKS: Final = ("allow_in_graph", "assume_constant_result", "disable")


def _unmarked(function: Any = None, **_options: Any) -> Any:
    """In place of what compiles a function or marks it for torch's compiler: as it is."""
    return function if function is not None else _unmarked


@contextmanager
def lean_imports() -> Iterator[None]:
    """What is imported meanwhile finds no compiler of torch's, no SciPy and, without a GPU, no
    Triton.

    bitsandbytes has its optimizers, and what it does on other devices, compiled by torch, and
    transformers marks functions for it that only other models and its own generation call; for
    either, torch imports all of its compiler. transformers' losses of object detection import
    SciPy's optimizers. torch asks for Triton, which is for GPUs alone. All do without; what has
    been imported already, stays.
    """
    modules: dict[str, Any] = sys.modules
    places: list[tuple[dict[str, Any], str, Any]] = [(vars(torch), "compile", _unmarked)]
    places += [(vars(torch.compiler), mark, _unmarked) for mark in _MARKS]
    if "torch._dynamo" not in modules:
        marks = SimpleNamespace(**dict.fromkeys(_MARKS, _unmarked))
        places.append((vars(torch), "_dynamo", marks))
    wanted = {"triton"} if torch.cuda.is_available() else set()
    for name in {"triton", "scipy"} - wanted - modules.keys():
        places.append((modules, name, None))  # None: not to be found (Python's import system)
    before = [(place, name, place.get(name)) for place, name, _ in places]
    for place, name, value in places:
        place[name] = value
    try:
        yield
    finally:
        for place, name, was in before:
            if was is None:
                del place[name]
            else:
                place[name] = was


with lean_imports():
    # The modules in which the classes are: transformers itself imports them when asked for.
    import accelerate  # noqa: F401
    import bitsandbytes  # noqa: F401
    import transformers.modeling_utils  # noqa: F401
