"""The kernel backend that the settings ask for."""

from __future__ import annotations

from pathlib import Path

import torch

from manyhats.errors import ConfigError
from manyhats_kernels import BackendUnavailableError, Resolved, resolve


def resolve_kernels(name: str, *, device: torch.device, home: Path) -> Resolved:
    """The backend called ``name`` for ``device``; ``auto`` is the fastest that works here.

    Native code is compiled at the first call and kept under ``home``. Raises ConfigError, saying
    why, for an unknown name and for a backend asked for by name that cannot work here.
    """
    try:
        return resolve(name, device=device, cache_dir=home / "kernels")
    except (ValueError, BackendUnavailableError) as error:
        raise ConfigError(f"kernels: {error}", param="kernels") from error
