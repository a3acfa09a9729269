"""The canonical form: what every adapter of every family is compiled to at registration.

An adapter is a set of typed parts, each bound to a *site* of the base model (a module, by its
dotted name). The engine and the kernels know only these parts, so families mix freely in one batch.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from manyhats.types import Digest


class SiteKind(enum.Enum):
    """What a module of the base is, as far as an adapter cares."""

    LINEAR = "linear"
    NORM = "norm"
    EMBEDDING = "embedding"
    HEAD = "head"


@dataclass(frozen=True, slots=True)
class SiteSpec:
    """One module of the base model that an adapter may name.

    ``in_features`` and ``out_features`` are logical ([tokens, in] -> [tokens, out]) whatever way
    the weight is stored; ``transposed`` is true for GPT-2's Conv1D. ``bias`` is the base's own bias
    in fp32 on the CPU, [out], or None where it has none.
    """

    name: str
    kind: SiteKind
    in_features: int
    out_features: int
    transposed: bool = False
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """The base model as the importers see it: its digest and the sites in the model's own order.

    ``num_layers`` is the number of transformer blocks. Site names are those of the transformers
    model (``model.layers.0.self_attn.q_proj``).
    """

    digest: str
    num_layers: int
    sites: Mapping[str, SiteSpec]


@dataclass(frozen=True, slots=True)
class LowRank:
    """d = (x A^T) B, scaling folded into B. ``a``: [rank, in]; ``b``: [rank, out]; same dtype,
    contiguous, CPU.
    """

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        """Number of rows."""
        return int(self.a.shape[0])


@dataclass(frozen=True, slots=True)
class SiteParts:
    """What one adapter does at one site. ``bias``: [out], added to the module's output (trained
    minus base).
    """

    low_rank: LowRank | None = None
    bias: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        tensors = [self.bias] if self.bias is not None else []
        if self.low_rank is not None:
            tensors += [self.low_rank.a, self.low_rank.b]
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True, slots=True)
class CompiledAdapter:
    """An adapter version in canonical form, on the host. ``family`` is as trained (``lora``,
    ``rslora``).

    ``sites`` has an entry only where the adapter does something.
    """

    digest: Digest
    family: str
    sites: Mapping[str, SiteParts]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(parts.nbytes for parts in self.sites.values())

    @property
    def max_rank(self) -> int:
        """Largest rank of any site, 0 if it has no low-rank part."""
        return max(
            (p.low_rank.rank for p in self.sites.values() if p.low_rank is not None), default=0
        )
