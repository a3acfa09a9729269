"""The backend, resolved once by name. One that cannot work here is an error that says why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from manyhats_kernels.backend import Backend, BackendUnavailableError
from manyhats_kernels.cpu import TorchBackend
from manyhats_kernels.native.backend import NativeBackend
from manyhats_kernels.reference import ReferenceBackend
from manyhats_kernels.triton.tiles import TileTable

NAMES = ("auto", "reference", "torch", "native", "triton")

OLDEST_CHIP = (8, 0)
"""The compute capability from which the Triton kernels are compiled and checked."""


@dataclass(frozen=True)
class Resolved:
    """A backend, the name by which it was asked for, and why it is this one (for the operator).

    ``fallback`` where ``auto`` had to pass over the kernels that are made for the device.
    """

    backend: Backend
    requested: str
    reason: str
    fallback: bool = False


def resolve(name: str, *, device: torch.device, cache_dir: Path) -> Resolved:
    """The backend called ``name`` (one of :data:`NAMES`) for tensors on ``device``.

    ``cache_dir`` keeps compiled native code between starts. ``auto`` takes the fastest that works
    here and ``reason`` says what was passed over. Raises ValueError on an unknown name and
    :class:`BackendUnavailableError` when a backend asked for by name cannot work here.
    """
    if name == "auto":
        return _automatic(device, cache_dir)
    reason = f"asked for by name: {name}"
    if name == "reference":
        return Resolved(ReferenceBackend(), name, reason)
    if name == "torch":
        return Resolved(TorchBackend(), name, reason)
    if name == "native":
        return Resolved(_native(device, cache_dir), name, reason)
    if name == "triton":
        return Resolved(_triton(device), name, reason)
    raise ValueError(f"unknown kernel backend {name!r}: expected one of {', '.join(NAMES)}")


def _native(device: torch.device, cache_dir: Path) -> NativeBackend:
    if device.type != "cpu":
        raise BackendUnavailableError(f"the native backend runs on the CPU, not on {device.type}")
    return NativeBackend.load(cache_dir)


def _triton(device: torch.device) -> Backend:
    if device.type != "cuda":
        raise BackendUnavailableError(
            f"the triton backend runs on a CUDA device, not on {device.type}"
        )
    if not torch.cuda.is_available():
        raise BackendUnavailableError("the triton backend needs a CUDA device: torch sees none")
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CHIP:
        raise BackendUnavailableError(
            f"the triton backend needs compute capability {OLDEST_CHIP} or newer, "
            f"{torch.cuda.get_device_name(device)} has {capability}"
        )
    try:
        # Only here: a server without triton starts all the same.
        from manyhats_kernels.triton.attention import TritonAttention
        from manyhats_kernels.triton.backend import TritonBackend
        from manyhats_kernels.triton.lora import Launcher
    except ImportError as error:
        raise BackendUnavailableError(f"triton cannot be imported: {error}") from error
    launcher = Launcher(TileTable.load(), f"sm_{capability[0]}{capability[1]}")
    return TritonBackend(TritonAttention(), launcher)


def _automatic(device: torch.device, cache_dir: Path) -> Resolved:
    if device.type == "cuda":
        try:
            return Resolved(_triton(device), "auto", "Triton kernels")
        except BackendUnavailableError as error:
            return _fallback(error)
    if device.type != "cpu":
        return Resolved(TorchBackend(), "auto", f"plain PyTorch: nothing else for {device.type}")
    try:
        return Resolved(_native(device, cache_dir), "auto", "native C kernels, compiled here")
    except BackendUnavailableError as error:
        return _fallback(error)


def _fallback(error: BackendUnavailableError) -> Resolved:
    return Resolved(TorchBackend(), "auto", f"plain PyTorch, slower: {error}", fallback=True)
