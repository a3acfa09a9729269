"""How much memory the device has and how much of it is in use, by whomever."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_AVAILABLE = "MemAvailable:"


def device_memory(device: torch.device) -> tuple[int, int]:
    """(bytes in use, bytes in all): the GPU's own figures, or without one the machine's."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free, total
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total - _available(), total


def _available(path: Path = Path("/proc/meminfo")) -> int:
    """What Linux could give to a new process; what it calls free elsewhere."""
    if path.exists():
        for line in path.read_text("ascii").splitlines():
            if line.startswith(_AVAILABLE):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
