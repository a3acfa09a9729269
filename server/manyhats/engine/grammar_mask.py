"""Allowed-token bitmasks, and how they reach the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import embedding


def mask_words(vocab_size: int) -> int:
    """32-bit words in a bitmask row."""
    return -(-vocab_size // 32)


def empty_masks(rows: int, vocab_size: int) -> Tensor:
    """Bitmask rows on the CPU, [rows, ceil(V / 32)] int32, nothing allowed."""
    return torch.zeros(rows, mask_words(vocab_size), dtype=torch.int32)


@cache
def _bits_of_bytes(device: torch.device) -> Tensor:
    """[256, 8] fp32: what each bit of a byte (lowest first) adds to a logit: 0 or -inf."""
    values = torch.arange(256, device=device).unsqueeze(1)
    bits = (values >> torch.arange(8, device=device)) & 1
    return torch.where(bits == 1, 0.0, -torch.inf)


@dataclass(frozen=True, slots=True)
class GrammarMasks:
    """Which tokens the constrained rows of a batch may take; rows not named are free.

    ``rows``: indices into the batch, each once. ``bits``: [len(rows), ceil(V / 32)] int32; token t
    of ``rows[i]`` is allowed when bit ``t % 32`` (lowest first) of word ``bits[i, t // 32]`` is
    set.
    """

    rows: Sequence[int]
    bits: Tensor

    def apply(self, logits: Tensor) -> None:
        """Set the forbidden tokens of ``logits`` [B, V] (fp32) to -inf, in place.

        Raises ValueError when ``bits`` has another number of rows, or of words, than it must.
        """
        vocab = logits.shape[1]
        if self.bits.shape != (len(self.rows), mask_words(vocab)):
            raise ValueError(
                f"masks are {list(self.bits.shape)}, not [{len(self.rows)}, {mask_words(vocab)}]"
            )
        octets = self.bits.to(logits.device).view(torch.uint8).int()
        added = embedding(octets, _bits_of_bytes(logits.device)).flatten(1)[:, :vocab]
        if list(self.rows) == list(range(logits.shape[0])):
            logits.add_(added)
        else:
            index = torch.tensor(self.rows, dtype=torch.int64, device=logits.device)
            logits.index_add_(0, index, added)
