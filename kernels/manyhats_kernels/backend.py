"""What a backend offers, and the checks that every backend makes before it touches memory.

:class:`Backend` says what each operation does; ``reference.py`` defines it in the plainest PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from manyhats_kernels.batch import AdapterBatch, AttentionBatch

if TYPE_CHECKING:
    from manyhats_kernels.groups import SiteGroup

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "tanh", "leaky_relu", "identity")
"""What ``bottleneck_add`` knows; ``gelu`` is by the error function, ``leaky_relu``'s slope 0.01."""

GATED = 256
"""Added to a slot's kind where its bottleneck is gated."""


class BackendUnavailableError(RuntimeError):
    """The backend asked for cannot work here; the message says why."""


@dataclass(frozen=True, eq=False)
class SiteRows:
    """The run of rank rows that each slot owns in the pools of one site.

    Slot ``s`` owns the rows ``start[s]:start[s] + count[s]`` of A and of B; count 0 means that the
    adapter has nothing at this site. Both are int32 ``[num_slots]``, contiguous, on the pools'
    device; anything else raises ValueError. A loader may write, in place, the entries of slots that
    no token of the running batch wears; a backend therefore reads no entry but those of worn slots
    and keeps no copy between calls. ``pointers`` are the two addresses, for native code, and
    ``num_slots`` the length.
    """

    start: Tensor
    count: Tensor
    pointers: tuple[int, int] = field(init=False)
    num_slots: int = field(init=False)

    def __post_init__(self) -> None:
        for name, tensor in (("start", self.start), ("count", self.count)):
            if tensor.dtype != torch.int32 or tensor.ndim != 1 or not tensor.is_contiguous():
                raise ValueError(
                    f"{name} must be a contiguous int32 vector, got {tensor.dtype} "
                    f"{tuple(tensor.shape)}"
                )
        if self.start.shape != self.count.shape or self.start.device != self.count.device:
            raise ValueError(
                f"start and count must be alike, got {self.start.shape[0]} slots on "
                f"{self.start.device} and {self.count.shape[0]} on {self.count.device}"
            )
        object.__setattr__(self, "pointers", (self.start.data_ptr(), self.count.data_ptr()))
        object.__setattr__(self, "num_slots", self.start.shape[0])


@runtime_checkable
class Backend(Protocol):
    """The operations of the engine that transformers does not have."""

    @property
    def name(self) -> str:
        """The name by which the backend is asked for."""

    def lora_add(
        self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, rows: SiteRows, batch: AdapterBatch
    ) -> None:
        """Add each token's low-rank product to ``y``, in place.

        ``y[t] += (x[t] @ A_s.T) @ B_s`` where ``s = batch.slots[t]``, ``A_s`` and ``B_s`` are the
        rows of ``a`` and ``b`` that ``rows`` gives to ``s``. Tokens of the base (``s = -1``) and of
        slots with no rows keep their bits.

        ``x`` is ``[T, in]``, ``y`` ``[T, out]``, ``a`` ``[R, in]``, ``b`` ``[R, out]``, one dtype
        of bf16, fp16, fp32; the last dimension of each is contiguous, rows may be strided.
        Accumulates in fp32 and rounds ``y + d`` once. The worn weights must be finite. Raises
        ValueError on shapes, dtypes or row runs that do not fit.
        """

    def lora_add_group(
        self, ys: Sequence[Tensor], x: Tensor, group: SiteGroup, batch: AdapterBatch
    ) -> None:
        """:meth:`lora_add` for each site of the group, ``ys[i]`` being site ``i``'s output.

        Raises ValueError as :meth:`lora_add` does.
        """

    def bias_add(self, y: Tensor, bias: Tensor, batch: AdapterBatch) -> None:
        """``y[t] += bias[batch.slots[t]]`` in place; tokens of the base keep their bits.

        ``y`` is ``[T, out]``, ``bias`` ``[num_slots, out]``, of one dtype.
        """

    def scale_rows(self, y: Tensor, scale: Tensor, batch: AdapterBatch) -> None:
        """``y[t] *= scale[batch.slots[t]]`` in place; tokens of the base keep their bits, and so do
        those of a slot whose scale is 1.

        ``y`` is ``[T, n]``, ``scale`` ``[num_slots, n]``, of one dtype.
        """

    def norm_rows(
        self,
        y: Tensor,
        x: Tensor,
        gain: Tensor,
        has: Tensor,
        shift: Tensor | None,
        batch: AdapterBatch,
        *,
        eps: float,
        centered: bool,
    ) -> None:
        """``y[t] = gain[s] * (x[t] - m) / sqrt(mean((x[t] - m)^2) + eps) + shift``, in place.

        For tokens whose slot ``s`` has ``has[s]`` not 0; all others keep their bits. ``m`` is the
        mean of ``x[t]`` where ``centered`` (LayerNorm), else 0 (RMSNorm). ``x`` and ``y`` are
        ``[T, n]``, ``gain`` ``[num_slots, n]``, ``shift`` ``[n]``, of one dtype; ``has`` is int32
        ``[num_slots]``. Computed in fp32, rounded once.
        """

    def bottleneck_add(
        self,
        y: Tensor,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        down_bias: Tensor,
        kinds: Tensor,
        rows: SiteRows,
        batch: AdapterBatch,
    ) -> None:
        """``y[t] += v B_s``, in place, ``v`` being what the slot's function makes of the token.

        ``A_s``, ``B_s`` and ``c_s`` are the rows of ``down``, ``up`` and ``down_bias`` that
        ``rows`` gives to ``s = batch.slots[t]``; ``z = A_s x[t] + c_s``; all rows but the last are
        the bottleneck's, ``v[r] = g act(z[r])``, and for the last ``v[-1] = g``. ``kinds[s]`` is
        ``ACTIVATIONS.index`` of act, plus :data:`GATED` where ``g = sigmoid(z[-1])``; otherwise
        ``g = 1``. So the last row of ``up`` is the bottleneck's own bias, and that of ``down`` its
        gate. Tokens of the base and of slots with no rows keep their bits.

        ``down_bias`` is fp32 ``[R]``, ``kinds`` int32 ``[num_slots]``; the rest is as in
        ``lora_add``, sums, bounds and errors too.
        """

    def kv_cache_shape(
        self, num_blocks: int, block_size: int, kv_heads: int, head_dim: int
    ) -> tuple[int, ...]:
        """The shape of each of the K cache and the V cache of one layer (contiguous)."""

    def store_kv(
        self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch
    ) -> None:
        """Write the new tokens' keys and values to ``batch.slot_mapping``'s places in the cache.

        ``k`` and ``v`` are ``[T, kv_heads, head_dim]``, possibly strided views, of the caches'
        dtype. Raises ValueError on shapes or dtypes that do not fit.
        """

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: AttentionBatch,
        *,
        scale: float,
        sliding_window: int | None,
        soft_cap: float | None,
    ) -> Tensor:
        """Causal attention of the new tokens over their sequences' cached keys and values.

        ``q`` is ``[T, heads, head_dim]``, possibly a strided view; head ``h`` reads kv head
        ``h // (heads // kv_heads)``. Query ``i`` of a sequence with ``n`` new tokens and ``c`` in
        all is at position ``p = c - n + i`` and sees the positions ``j <= p``, with a window also
        ``p - j < sliding_window``. Scores are ``q . k * scale``, with ``soft_cap`` then
        ``soft_cap * tanh(score / soft_cap)``; softmax and sums are fp32. The new tokens must have
        been stored before. Returns ``[T, heads, head_dim]`` of q's dtype, contiguous. Raises
        ValueError on shapes or dtypes that do not fit, K and V of different head sizes among them.
        """


def check_lora(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, rows: SiteRows, batch: AdapterBatch
) -> None:
    """Raise ValueError, naming what is wrong, unless the arguments fit :meth:`Backend.lora_add`."""
    if not y.dtype == x.dtype == a.dtype == b.dtype or x.dtype not in DTYPES:
        raise ValueError(
            "y, x, a and b must share one dtype of bfloat16, float16, float32, got "
            f"{y.dtype}, {x.dtype}, {a.dtype}, {b.dtype}"
        )
    shapes = f"y {tuple(y.shape)}, x {tuple(x.shape)}, a {tuple(a.shape)}, b {tuple(b.shape)}"
    if not y.ndim == x.ndim == a.ndim == b.ndim == 2:
        raise ValueError(f"y, x, a and b must be two-dimensional: {shapes}")
    if x.shape[1] != a.shape[1] or y.shape[1] != b.shape[1] or a.shape[0] != b.shape[0]:
        raise ValueError(f"x and a, y and b, a and b do not fit: {shapes}")
    if not x.shape[0] == y.shape[0] == batch.num_tokens:
        raise ValueError(f"the plan has {batch.num_tokens} tokens: {shapes}")
    if any(t.shape[1] > 1 and t.stride(1) != 1 for t in (y, x, a, b)):
        raise ValueError("the last dimension of y, x, a and b must be contiguous")
    if rows.num_slots < batch.num_slots:
        raise ValueError(f"rows cover {rows.num_slots} slots, the plan {batch.num_slots}")


def check_run(slot: int, start: int, count: int, pool_rows: int) -> None:
    """Raise ValueError unless rows ``start:start + count`` lie within a pool of ``pool_rows``."""
    if count < 0 or (count > 0 and (start < 0 or start + count > pool_rows)):
        raise ValueError(
            f"slot {slot} owns rows {start}:{start + count}, outside the pool's {pool_rows}"
        )


def check_bias(y: Tensor, bias: Tensor, batch: AdapterBatch, name: str = "bias") -> None:
    """Raise ValueError unless the arguments fit :meth:`Backend.bias_add` (or ``scale_rows``)."""
    if y.dtype != bias.dtype or y.dtype not in DTYPES:
        raise ValueError(
            f"y and {name} must share a dtype of {DTYPES}, got {y.dtype}, {bias.dtype}"
        )
    if y.ndim != 2 or bias.ndim != 2 or y.shape[1] != bias.shape[1]:
        raise ValueError(f"y {tuple(y.shape)} and {name} {tuple(bias.shape)} do not fit")
    if y.shape[0] != batch.num_tokens or bias.shape[0] < batch.num_slots:
        raise ValueError(
            f"the plan has {batch.num_tokens} tokens and {batch.num_slots} slots, "
            f"y {y.shape[0]} rows and {name} {bias.shape[0]}"
        )


def check_norm(
    y: Tensor, x: Tensor, gain: Tensor, has: Tensor, shift: Tensor | None, batch: AdapterBatch
) -> None:
    """Raise ValueError unless the arguments fit :meth:`Backend.norm_rows`."""
    check_bias(y, gain, batch, "gain")
    if x.shape != y.shape or x.dtype != y.dtype:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} must be as y {tuple(y.shape)} {y.dtype}")
    if has.dtype != torch.int32 or has.shape != gain.shape[:1]:
        raise ValueError(f"has must be int32 {gain.shape[0]}, got {has.dtype} {tuple(has.shape)}")
    if shift is not None and (shift.dtype != y.dtype or shift.shape != y.shape[1:]):
        raise ValueError(f"shift {tuple(shift.shape)} and y {tuple(y.shape)} do not fit")


def check_bottleneck(down: Tensor, down_bias: Tensor, kinds: Tensor, batch: AdapterBatch) -> None:
    """Raise ValueError unless what ``lora_add`` does not have fits ``bottleneck_add``."""
    if down_bias.dtype != torch.float32 or down_bias.shape != down.shape[:1]:
        raise ValueError(
            f"down_bias must be float32 {down.shape[0]}, got {down_bias.dtype} "
            f"{tuple(down_bias.shape)}"
        )
    if kinds.dtype != torch.int32 or kinds.ndim != 1 or kinds.shape[0] < batch.num_slots:
        raise ValueError(
            f"kinds must be int32 for {batch.num_slots} slots, got {kinds.dtype} "
            f"{tuple(kinds.shape)}"
        )


def check_caches(k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch) -> None:
    """Raise ValueError unless the caches are alike, whole and hold every block of the plan."""
    if k_cache.shape != v_cache.shape:
        raise ValueError(
            "K and V must have the same head size and the same number of blocks and heads, got "
            f"{tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    if k_cache.dtype != v_cache.dtype or k_cache.dtype not in DTYPES:
        raise ValueError(
            f"caches must share a dtype of {DTYPES}, got {k_cache.dtype}, {v_cache.dtype}"
        )
    if k_cache.ndim != 4 or k_cache.shape[2] != batch.block_size:
        raise ValueError(
            f"a cache of shape {tuple(k_cache.shape)} is not [blocks, kv_heads, "
            f"{batch.block_size}, head_dim]"
        )
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("the caches must be contiguous")
    if batch.max_block >= k_cache.shape[0]:
        raise ValueError(
            f"block {batch.max_block} is outside the cache's {k_cache.shape[0]} blocks"
        )


def check_store(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch
) -> None:
    """Raise ValueError unless the arguments fit :meth:`Backend.store_kv`."""
    check_caches(k_cache, v_cache, batch)
    wanted = (batch.num_tokens, k_cache.shape[1], k_cache.shape[3])
    if k.shape != wanted or v.shape != wanted:
        raise ValueError(f"k and v must be {wanted}, got {tuple(k.shape)} and {tuple(v.shape)}")
    if not k.dtype == v.dtype == k_cache.dtype:
        raise ValueError(f"k {k.dtype} and v {v.dtype} must be of the caches' {k_cache.dtype}")


def check_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    sliding_window: int | None,
    soft_cap: float | None,
) -> None:
    """Raise ValueError unless the arguments fit :meth:`Backend.paged_attention`."""
    check_caches(k_cache, v_cache, batch)
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    if q.ndim != 3 or q.shape[0] != batch.num_tokens or q.shape[2] != head_dim:
        raise ValueError(f"q must be [{batch.num_tokens}, heads, {head_dim}], got {tuple(q.shape)}")
    if q.shape[1] % kv_heads:
        raise ValueError(f"{q.shape[1]} heads are no multiple of {kv_heads} kv heads")
    if q.dtype != k_cache.dtype:
        raise ValueError(f"q {q.dtype} must be of the caches' {k_cache.dtype}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be >= 1, got {sliding_window}")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap must be > 0, got {soft_cap}")
