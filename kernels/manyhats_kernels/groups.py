"""Layers that read the same input (q, k and v; gate and up), taken in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from manyhats_kernels.backend import DTYPES, SiteRows
from manyhats_kernels.batch import AdapterBatch, Planned
from manyhats_kernels.fourbit import FourBitWeight


@dataclass(frozen=True, eq=False)
class SiteWeights:
    """One site's pools: ``a`` is [R, in], ``b`` [R, out], ``rows`` says who owns which."""

    a: Tensor
    b: Tensor
    rows: SiteRows


class SiteGroup:
    """Sites that read the same input. ``descriptor`` is what native code reads, ten int64 a site;
    the first two, the output's address and stride, are the launcher's to fill.

    Raises ValueError where the sites do not share a dtype and an input size, or have other than
    two-dimensional pools with contiguous rows.
    """

    FIELDS = 10

    def __init__(self, sites: Sequence[SiteWeights]) -> None:
        self.sites = tuple(sites)
        if not self.sites:
            raise ValueError("a group needs at least one site")
        first = self.sites[0]
        self.dtype = first.a.dtype
        self.num_slots = min(site.rows.num_slots for site in self.sites)
        fields: list[int] = []
        for site in self.sites:
            a, b = site.a, site.b
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[0]:
                raise ValueError(f"a {tuple(a.shape)} and b {tuple(b.shape)} do not fit")
            if a.shape[1] != first.a.shape[1]:
                raise ValueError(f"a has {a.shape[1]} inputs, the group {first.a.shape[1]}")
            if not a.dtype == b.dtype == self.dtype or self.dtype not in DTYPES:
                raise ValueError(f"a is {a.dtype}, b {b.dtype}, the group {self.dtype}")
            if a.stride(1) != 1 or b.stride(1) != 1:
                raise ValueError("the last dimension of a and b must be contiguous")
            sizes = (a.stride(0), b.stride(0), b.shape[1], a.shape[0])
            fields += [0, 0, a.data_ptr(), b.data_ptr(), *sizes, *site.rows.pointers]
        self.in_features = int(first.a.shape[1])
        self.outs = tuple(int(site.b.shape[1]) for site in self.sites)
        self.descriptor = (ctypes.c_int64 * len(fields))(*fields)

    def descriptor_for(self, ys: Sequence[Tensor]) -> ctypes.Array[ctypes.c_int64]:
        """``descriptor`` with these outputs in it; rows of each are contiguous."""
        return _point(self.descriptor, self.FIELDS, ys)

    def check(self, ys: Sequence[Tensor], x: Tensor, num_tokens: int, num_slots: int) -> None:
        """Raise ValueError, naming what is wrong, unless the arguments fit the group."""
        if x.dtype != self.dtype or x.shape != (num_tokens, self.in_features) or x.stride(1) != 1:
            raise ValueError(
                f"x must be [{num_tokens}, {self.in_features}] of {self.dtype} with contiguous "
                f"rows, got {tuple(x.shape)} {x.dtype}"
            )
        if self.num_slots < num_slots:
            raise ValueError(f"rows cover {self.num_slots} slots, the batch has {num_slots}")
        if len(ys) != len(self.sites):
            raise ValueError(f"{len(ys)} outputs for {len(self.sites)} sites")
        for y, out in zip(ys, self.outs, strict=True):
            if y.dtype != self.dtype or y.shape != (num_tokens, out) or y.stride(1) != 1:
                raise ValueError(
                    f"y must be [{num_tokens}, {out}] of {self.dtype} with contiguous rows, got "
                    f"{tuple(y.shape)} {y.dtype}"
                )


@dataclass(frozen=True, eq=False)
class DenseWeight:
    """A bf16 matrix [N, K], contiguous, of any device. Raises ValueError on anything else."""

    weight: Tensor

    def __post_init__(self) -> None:
        weight = self.weight
        if weight.ndim != 2 or weight.dtype != torch.bfloat16 or not weight.is_contiguous():
            raise ValueError(
                f"weight must be a contiguous bf16 matrix, got {tuple(weight.shape)} {weight.dtype}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return int(self.weight.shape[0]), int(self.weight.shape[1])


class MatrixGroup:
    """Matrices, all 4-bit or all bf16, that multiply the same x, each with its bias or None.

    ``descriptor`` is what native code reads, eight int64 a matrix; the first two, the output's
    address and stride, are the launcher's to fill. Raises ValueError where they do not fit.
    """

    FIELDS = 8

    def __init__(
        self, weights: Sequence[FourBitWeight | DenseWeight], biases: Sequence[Tensor | None]
    ) -> None:
        self.weights = tuple(weights)
        self.biases = tuple(biases)
        if not self.weights or len(self.weights) != len(self.biases):
            raise ValueError(f"{len(self.weights)} matrices and {len(self.biases)} biases")
        kinds = {type(weight) for weight in self.weights}
        inputs = {weight.shape[1] for weight in self.weights}
        if len(kinds) != 1 or len(inputs) != 1:
            raise ValueError("the matrices of a group must be of one kind and of one input size")
        self.in_features = inputs.pop()
        self.outs = tuple(weight.shape[0] for weight in self.weights)
        self.ends = tuple(sum(self.outs[: i + 1]) for i in range(len(self.outs)))
        fields: list[int] = []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            n, _ = weight.shape
            if bias is not None and (
                bias.shape != (n,) or bias.dtype != torch.bfloat16 or not bias.is_contiguous()
            ):
                raise ValueError(f"bias must be [{n}] of bf16, got {tuple(bias.shape)}")
            pointers = (
                (weight.packed, weight.absmax, weight.code)
                if isinstance(weight, FourBitWeight)
                else (weight.weight, None, None)
            )
            block = weight.blocksize if isinstance(weight, FourBitWeight) else 0
            fields += [0, 0, n, block, *(0 if t is None else t.data_ptr() for t in pointers)]
            fields.append(0 if bias is None else bias.data_ptr())
        self.descriptor = (ctypes.c_int64 * len(fields))(*fields)

    def descriptor_for(self, ys: Sequence[Tensor]) -> ctypes.Array[ctypes.c_int64]:
        """``descriptor`` with these outputs in it; rows of each are contiguous."""
        return _point(self.descriptor, self.FIELDS, ys)

    def outputs(self, tokens: int) -> list[Tensor]:
        """Room for the products of so many tokens: bf16 [tokens, N] each, views of one buffer."""
        y = torch.empty((tokens, self.ends[-1]), dtype=torch.bfloat16)
        if len(self.outs) == 1:
            return [y]
        return [y[:, end - out : end] for end, out in zip(self.ends, self.outs, strict=True)]


def _point(
    descriptor: ctypes.Array[ctypes.c_int64], fields: int, ys: Sequence[Tensor]
) -> ctypes.Array[ctypes.c_int64]:
    for i, y in enumerate(ys):
        descriptor[i * fields] = y.data_ptr()
        descriptor[i * fields + 1] = y.stride(0)
    return descriptor


@runtime_checkable
class GroupedMatmul(Protocol):
    """A backend that multiplies one x by several matrices in one call."""

    def takes(self, weight: FourBitWeight | DenseWeight) -> bool:
        """Whether :meth:`matmul_group` is for this weight, on this machine."""

    def matmul_group(self, x: Tensor, group: MatrixGroup) -> list[Tensor]:
        """``x @ W.T + bias`` for each matrix: a list of [T, N], views of one buffer.

        ``x`` is bf16 [T, K], its rows contiguous; sums are fp32, rounded once. Raises ValueError on
        shapes or dtypes that do not fit, and on weights that :meth:`takes` does not take.
        """

    def matmul_lora_group(
        self, x: Tensor, group: MatrixGroup, sites: SiteGroup, batch: AdapterBatch
    ) -> list[Tensor]:
        """``x @ W.T + bias + (x @ A_s.T) @ B_s`` for each matrix and its site, as
        :meth:`matmul_group` and then :meth:`Backend.lora_add_group`; whether the base's part is
        rounded before the adapters' is added is the backend's to choose.

        Raises ValueError on shapes or dtypes that do not fit.
        """


@dataclass(frozen=True, eq=False)
class AdaptedFourBit:
    """4-bit matrices that multiply the same x, each with its bias or None, and the adapters' pools
    at each. Raises ValueError where they do not fit together.
    """

    weights: tuple[FourBitWeight, ...]
    biases: tuple[Tensor | None, ...]
    sites: SiteGroup

    def __post_init__(self) -> None:
        if not len(self.weights) == len(self.biases) == len(self.sites.sites):
            raise ValueError(
                f"{len(self.weights)} matrices, {len(self.biases)} biases and "
                f"{len(self.sites.sites)} sites"
            )
        for weight, out in zip(self.weights, self.sites.outs, strict=True):
            if weight.shape != (out, self.sites.in_features):
                raise ValueError(
                    f"a matrix is {weight.shape}, its site {(out, self.sites.in_features)}"
                )

    def check(self, x: Tensor, worn: Sequence[bool], batch: Planned) -> None:
        """Raise ValueError, naming what is wrong, unless the arguments fit
        :meth:`FusedFourBit.matmul_4bit_lora_group`.
        """
        sites = self.sites
        if x.dtype != sites.dtype or x.shape != (batch.num_tokens, sites.in_features):
            raise ValueError(
                f"x must be [{batch.num_tokens}, {sites.in_features}] of {sites.dtype}, got "
                f"{tuple(x.shape)} {x.dtype}"
            )
        if len(worn) != len(self.weights):
            raise ValueError(f"worn has {len(worn)} entries for {len(self.weights)} matrices")
        if sites.num_slots < batch.num_slots:
            raise ValueError(f"rows cover {sites.num_slots} slots, the plan {batch.num_slots}")


@runtime_checkable
class FusedFourBit(Protocol):
    """A backend that adds the adapters' low-rank products while it multiplies by 4-bit weights."""

    def matmul_4bit_lora_group(
        self, x: Tensor, group: AdaptedFourBit, worn: Sequence[bool], batch: AdapterBatch
    ) -> list[Tensor]:
        """``y_i[t] = W_i x[t] + bias_i + (x[t] @ A_s.T) @ B_s`` for each matrix ``i``.

        ``W_i`` is as in :meth:`FourBit.matmul_4bit`; ``A_s`` and ``B_s`` are the rows at site ``i``
        of ``s = batch.slots[t]``, as in :meth:`Backend.lora_add`. ``worn[i]`` says whether a token
        wears an adapter with rows at site ``i``: where none does, nothing of it is read. ``x`` is
        ``[T, K]``, its last dimension contiguous, of the sites' dtype. Sums are fp32; a result is
        rounded once, or twice where a product is made first and the low-rank one added to it.
        Returns contiguous ``[T, N_i]``. Raises ValueError on what does not fit.
        """
