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


def check_rank(kernels: Resolved, max_rank: int) -> None:
    """Raises ConfigError where adapters may have more rank rows than the kernels take."""
    bound: int | None = getattr(kernels.backend, "max_rank", None)
    if bound is not None and max_rank > bound:
        raise ConfigError(
            f"max_rank: {max_rank} is over the {bound} that the {kernels.backend.name} kernels "
            "take",
            param="max_rank",
        )
