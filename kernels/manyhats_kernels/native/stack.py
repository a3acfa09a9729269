"""The launcher of a whole step in C."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from manyhats_kernels.batch import AdapterBatch, AttentionBatch
from manyhats_kernels.native.parts import PREFILL_QUERIES, check_memory
from manyhats_kernels.stack import LayerStack
from manyhats_kernels.stack_parts import StackParts

_P, _F = c_void_p, c_float


class NativeStack:
    """All layers in one call, which holds no lock of Python's; a token's result has the same bits
    whoever is beside it.
    """

    _amx: int

    def __init__(self, library: ctypes.CDLL) -> None:
        """Take the entry point of a library that ``native.build.load`` gave."""
        self._stack = library.mh_stack
        self._stack.restype = c_int64
        self._stack.argtypes = [c_int, c_int, *[_P] * 5, _F, _F, _F]

    @property
    def stacks_prompts(self) -> bool:
        """See :attr:`manyhats_kernels.stack.StackRunner.stacks_prompts`: on AMX tiles."""
        return bool(self._amx)

    def run_stack(
        self,
        hidden: Tensor,
        stack: LayerStack,
        cos: Tensor,
        sin: Tensor,
        attention: AttentionBatch,
        adapters: AdapterBatch,
        parts: StackParts | None = None,
    ) -> None:
        """See :meth:`manyhats_kernels.stack.StackRunner.run_stack`."""
        stack.check(hidden, cos, sin, attention, adapters)
        tokens = attention.num_tokens
        if not tokens:
            return
        step = (c_int64 * 15)(
            tokens,
            attention.num_sequences,
            attention.block_tables.size(1),
            len(adapters.segments),
            *attention.pointers,
            *adapters.pointers,
            cos.data_ptr(),
            sin.data_ptr(),
            adapters.slots.data_ptr(),
            PREFILL_QUERIES if self._amx else tokens,
        )
        failed = self._stack(
            torch.get_num_threads(),
            self._amx,
            stack.shape,
            stack.descriptor,
            parts.descriptor if parts is not None else None,
            step,
            hidden.data_ptr(),
            stack.eps,
            stack.head_eps,
            stack.scale,
        )
        if failed > 0:
            raise ValueError(
                f"layer {failed - 1}: a worn slot's rank rows lie outside of their pool"
            )
        check_memory(failed)
