"""The canonical form: what every adapter of every family is compiled to at registration.

An adapter is a set of typed parts, each bound to a *site* of the base model (a module, by its
dotted name). The engine and the kernels know only these parts, so families mix freely in one batch.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import torch

from manyhats.types import Digest

CONVERSION: Final = ("conversion_error", "converted_sites", "replaced_sites")
"""What ``CompiledAdapter.metadata`` says of weight changes that were brought to other parts."""


class SiteKind(enum.Enum):
    """What a module of the base is, as far as an adapter cares."""

    LINEAR = "linear"
    NORM = "norm"
    EMBEDDING = "embedding"
    HEAD = "head"
    ATTENTION = "attention"
    RESIDUAL = "residual"


@dataclass(frozen=True, slots=True)
class NormKind:
    """How a norm of the base works: y = (x - mean, where ``centered``) / sqrt(mean square + eps),
    times weight + ``SiteSpec.offset``, plus its bias.
    """

    eps: float
    centered: bool


@dataclass(frozen=True, slots=True)
class SiteSpec:
    """One module of the base model that an adapter may name.

    ``in_features`` and ``out_features`` are logical ([tokens, in] -> [tokens, out]) whatever way
    the weight is stored; ``transposed`` is true for GPT-2's Conv1D. For attention they are the
    number of kv heads and the head's size, for a norm, an embedding's output and a residual site
    the features of the stream. ``bias`` is the base's own bias in fp32 on the CPU, [out], or None
    where it has none.

    ``offset`` is what a norm adds to its weight (Gemma: 1), ``norm`` the rest of what it does (None
    where that is of no known kind: such a norm takes no gain). ``scale`` is what an embedding
    multiplies its rows by (Gemma: the square root of the width), ``tied_to`` the embedding whose
    weight a head shares. ``rotary``: the frequencies, fp32 [pairs], by which an attention's keys
    are rotated, where these are fixed, the same in every layer and all there is to the rotation,
    and no window hides the oldest keys.
    """

    name: str
    kind: SiteKind
    in_features: int
    out_features: int
    transposed: bool = False
    bias: torch.Tensor | None = None
    offset: float = 0.0
    scale: float = 1.0
    tied_to: str | None = None
    norm: NormKind | None = None
    rotary: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """The base model as the importers see it: its digest and the sites in the model's own order.

    ``num_layers`` is the number of transformer blocks. Site names are those of the transformers
    model (``model.layers.0.self_attn.q_proj``); a residual site, which is no module, is called by
    its layer and place (``model.layers.0.after_attention``, ``model.layers.0.after_mlp``). A place
    where the engine cannot serve a part (the residual sites of an unknown kind of layer) is not
    among the sites.
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


class Activation(enum.Enum):
    """The function between the two matrices of a bottleneck, as AdapterHub names it."""

    RELU = "relu"
    GELU = "gelu"
    GELU_TANH = "gelu_new"
    SILU = "swish"
    TANH = "tanh"
    LEAKY_RELU = "leakyrelu"
    IDENTITY = "linear"


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """d = act(x A^T + c) B + e, where A is ``down``, [width, hidden], c ``down_bias``, [width], B
    ``up``, [width, hidden], the scale folded in, and e ``up_bias``, [hidden], likewise.

    The block (attention or mlp) adds its output o to the stream r that entered it, h = r + o. x is
    h, with ``parallel`` r, with ``of_output`` o (only one of the two). The stream after the block
    is h + d; without ``skip`` it is d alone. ``gate``: [hidden] and ``gate_bias`` multiply d by
    sigmoid(x . gate + gate_bias) of each token.
    """

    down: torch.Tensor
    up: torch.Tensor
    activation: Activation
    down_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    parallel: bool = False
    of_output: bool = False
    skip: bool = True
    gate: torch.Tensor | None = None
    gate_bias: float = 0.0


@dataclass(frozen=True, slots=True)
class Fusion:
    """Attention of a token over what several bottlenecks give, d_i (AdapterFusion, Pfeiffer et al.
    2021): the stream after the block is h + V sum_i p_i d_i with p = softmax_i(q . k_i /
    ``temperature``), q = Q x + ``query_bias``, k_i = K d_i + ``key_bias``, x being what the last
    bottleneck reads.

    ``query``, ``key``, ``value``: [hidden, hidden], y = x W^T; without ``value`` V is 1. Every
    bottleneck beside it has ``skip``.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor | None
    query_bias: torch.Tensor | None = None
    key_bias: torch.Tensor | None = None
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys and values that come before a sequence's own. ``k``, ``v``: [tokens, kv heads, head
    dim], keys as they lie in the cache (whatever rotation the family applies, applied).
    """

    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Replaced rows of an embedding or of the head. ``token_ids``: int64 [n], ascending;
    ``vectors``: [n, features].
    """

    token_ids: torch.Tensor
    vectors: torch.Tensor


@dataclass(frozen=True, slots=True)
class SiteParts:
    """What one adapter does at one site, in this order.

    - linear and head: y = ``output_scale`` * (W (``input_scale`` * x) + base's bias + ``low_rank``
      of the scaled x) + ``bias``; ``dense``, [out, in], stands in for W. Rows of a head replace
      rows of W.
    - embedding: y = W[id], ``rows`` or ``dense`` ([ids, hidden]) instead of W, plus ``low_rank``
      with A's columns being ids; ``soft_prompt``, [tokens, hidden], are the vectors of the
      adapter's virtual tokens, taken as they are. y is what the module puts out: a base that scales
      its embeddings has every part scaled already.
    - norm: y = ``gain`` * normalized x + base's bias + ``bias``; ``gain`` replaces the weight and
      is what x is multiplied by (a base that multiplies by 1 + weight has it added already).
    - residual: the ``bottlenecks`` one after the other, o standing for what the one before left of
      it; with ``fusion`` side by side.
    - attention: the ``prefix``, as many tokens as the adapter has virtual ones.

    ``input_scale``: [in]; ``output_scale``, ``bias``, ``gain``: [out].
    """

    low_rank: LowRank | None = None
    bias: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    output_scale: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    dense: torch.Tensor | None = None
    rows: Rows | None = None
    soft_prompt: torch.Tensor | None = None
    prefix: Prefix | None = None
    bottlenecks: tuple[Bottleneck, ...] = ()
    fusion: Fusion | None = None

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor held."""
        yield from _tensors(self)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return sum(t.nbytes for t in _tensors(self))


def _tensors(part: object) -> list[torch.Tensor]:
    # A list, and no call of fields(): a load counts the tensors of hundreds of sites.
    if isinstance(part, torch.Tensor):
        return [part]
    inner = part if isinstance(part, tuple) else [getattr(part, n) for n in field_names(type(part))]
    return [tensor for item in inner if item is not None for tensor in _tensors(item)]


def field_names(kind: type) -> Iterable[str]:
    """The fields of a kind of part; none of what is no part, but a value."""
    names: Iterable[str] = getattr(kind, "__dataclass_fields__", ())
    return names


@dataclass(frozen=True, slots=True)
class CompiledAdapter:
    """An adapter version in canonical form, on the host. ``family`` is as trained (``lora``,
    ``rslora``).

    ``sites`` has an entry only where the adapter does something. ``virtual_tokens`` come before
    every prompt, at the positions 0 up to their number: a soft prompt gives their embeddings, a
    prefix their keys and values in every layer.
    """

    digest: Digest
    family: str
    sites: Mapping[str, SiteParts]
    metadata: Mapping[str, str] = field(default_factory=dict)
    virtual_tokens: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(parts.nbytes for parts in self.sites.values())

    @property
    def conversion(self) -> Mapping[str, str]:
        """How weight changes became parts: of the metadata, what is kept with the version."""
        return {name: self.metadata[name] for name in CONVERSION if name in self.metadata}

    @property
    def max_rank(self) -> int:
        """Largest rank of any site, 0 if it has no low-rank part."""
        return max(
            (p.low_rank.rank for p in self.sites.values() if p.low_rank is not None), default=0
        )
