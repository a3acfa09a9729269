"""The base's own weights, for the families whose parts depend on them."""

from __future__ import annotations

from typing import Protocol

import torch


class BaseWeights(Protocol):
    """Reads weights of the loaded base. Thread-safe; may take long (4 bits are unpacked)."""

    def weight(self, site_name: str) -> torch.Tensor:
        """The weight of a linear site, the head or an embedding, a copy in fp32 on the CPU.

        [out, in] whatever way it is stored, [ids, hidden] of an embedding; of a quantized base what
        the base multiplies by. Raises KeyError where there is no such site.
        """
