"""Imports transformers and bitsandbytes without what both would bring along for nothing, which
takes seconds of every start.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, Final

import torch
from torch import distributed

_COMPILER: Final = "torch._dynamo"
_INDEXING: Final = "torch._dynamo._trace_wrapped_higher_order_op"


@contextmanager
def lean_imports() -> Iterator[None]:
    """What is imported meanwhile finds torch's compiler switched off, no SciPy, no boto3, no
    ``torch.distributed`` and, without a GPU, no Triton.

    bitsandbytes has its optimizers, and what it does on other devices, compiled by torch.
    transformers marks functions for that compiler, which takes a second to import (and would ask
    for Triton); its losses of object detection import SciPy's optimizers, and it looks for tensors
    that are spread over processes, as it need not where torch was built without them. accelerate's
    dialogue for SageMaker imports boto3. All do without; what has been imported already, stays.
    """
    with ExitStack() as undone:
        undone.enter_context(_hidden())
        undone.enter_context(without_compiler())
        undone.enter_context(_without_processes())
        yield


@contextmanager
def _hidden() -> Iterator[None]:
    """Modules that are not to be found."""
    modules: dict[str, Any] = sys.modules
    wanted = {"triton"} if torch.cuda.is_available() else set()
    hidden = {"triton", "scipy", "boto3"} - wanted - modules.keys()
    modules.update(dict.fromkeys(hidden))  # None: not to be found (Python's import system)
    try:
        yield
    finally:
        for name in hidden:
            modules.pop(name, None)


class _StandIn(ModuleType):
    """A module with a few names of its own; asked for any other, it gives way to the real one."""

    def __init__(self, name: str, **own: object) -> None:
        super().__init__(name)
        vars(self).update(own)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system's own questions
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


@contextmanager
def without_compiler() -> Iterator[None]:
    """``torch.compile`` and the marks for it leave functions as they are, and the compiler stays
    out, unless it is there already or somebody asks it for more than marks.

    Also for building a model on the meta device, where torch's own Python carries such marks.
    """
    replaced: list[tuple[ModuleType, str, object]] = [(torch, "compile", _unchanged)]
    if _COMPILER not in sys.modules:
        marks = ("allow_in_graph", "assume_constant_result", "disable")
        replaced += [(torch.compiler, name, _unchanged) for name in marks]
        compiler = _StandIn(_COMPILER, **dict.fromkeys(marks, _unchanged))
        compiler.__path__ = [f"{folder}/_dynamo" for folder in torch.__path__]
        replaced += [(torch, "_dynamo", compiler)]
        sys.modules[_COMPILER] = compiler
        sys.modules[_INDEXING] = _StandIn(_INDEXING, TransformGetItemToIndex=_indexing)
    before = [(module, name, vars(module).get(name)) for module, name, _ in replaced]
    for module, name, value in replaced:
        vars(module)[name] = value
    try:
        yield
    finally:
        for module, name, value in before:
            if value is not None:
                vars(module)[name] = value
            elif isinstance(vars(module)[name], _StandIn):
                del vars(module)[name]  # torch imports it when it is asked for
        for name in (_INDEXING, _COMPILER):
            if isinstance(sys.modules.get(name), _StandIn):
                del sys.modules[name]


def _unchanged(model: Any = None, *_: object, **__: object) -> Any:
    """A decorator, with or without options, that gives back what it decorates."""
    return _unchanged if model is None else model


def _indexing() -> Any:
    """The compiler's ``TransformGetItemToIndex``, imported by who makes one."""
    return importlib.import_module(_INDEXING).TransformGetItemToIndex()


@contextmanager
def _without_processes() -> Iterator[None]:
    """torch says that it was built without ``torch.distributed``, unless that is in use."""
    available: Callable[[], bool] = distributed.is_available
    if not available() or distributed.is_initialized():
        yield
        return
    vars(distributed)["is_available"] = _no
    try:
        yield
    finally:
        vars(distributed)["is_available"] = available


def _no() -> bool:
    return False


with lean_imports():
    # The modules in which the classes are: transformers itself imports them when asked for.
    import accelerate  # noqa: F401
    import bitsandbytes  # noqa: F401
    import transformers.masking_utils
    import transformers.modeling_utils  # noqa: F401
