"""Threads that bring adapters to the device beside the step loop."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch


def loader_threads(name: str, count: int) -> ThreadPoolExecutor:
    """``count`` threads that compute alone, so that loads leave the cores to the step loop."""
    return ThreadPoolExecutor(count, thread_name_prefix=name, initializer=_single_threaded)


def _single_threaded() -> None:
    torch.get_num_threads()  # torch sets up a thread's count at its first use
    torch.set_num_threads(1)
