"""The Triton backend for tests: in the interpreter, or on the GPU where there is one."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="triton is made for Linux on x86-64 alone")

from manyhats_kernels.cpu import TorchBackend
from manyhats_kernels.triton.backend import TritonBackend
from manyhats_kernels.triton.lora import Launcher
from manyhats_kernels.triton.tiles import OPERATIONS, PHASES, Tile, TileTable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

SMALL = TileTable(
    tuple(
        Tile(
            chip="any",
            op=op,
            phase=phase,
            bits=bits,
            up_to=0,
            ranks=16,
            span=16 if op == "shrink" else 64,
            split=2 if (op, phase) == ("shrink", "decode") else 1,
            warps=4,
            stages=2,
        )
        for op, phase, bits in itertools.product(OPERATIONS, PHASES, (16, 32))
    )
)
"""Tiles so small that small shapes take several steps in every direction, with a ragged last."""


def triton_backend(table: TileTable = SMALL, **limits: int) -> TritonBackend:
    return TritonBackend(TorchBackend(), Launcher(table, "any"), **limits)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)
