"""Kernels for batches whose tokens wear different adapters; knows nothing of the server around."""

from manyhats_kernels.backend import (
    ACTIVATIONS,
    GATED,
    Backend,
    BackendUnavailableError,
    SiteRows,
)
from manyhats_kernels.batch import AdapterBatch, AttentionBatch
from manyhats_kernels.dispatch import Resolved, resolve
from manyhats_kernels.fourbit import Expand, FourBit, FourBitWeight, NestedScales
from manyhats_kernels.static_attention import Capturable, StaticAttentionBatch
from manyhats_kernels.static_batch import StaticAdapterBatch

__all__ = [
    "ACTIVATIONS",
    "GATED",
    "AdapterBatch",
    "AttentionBatch",
    "Backend",
    "BackendUnavailableError",
    "Capturable",
    "Expand",
    "FourBit",
    "FourBitWeight",
    "NestedScales",
    "Resolved",
    "SiteRows",
    "StaticAdapterBatch",
    "StaticAttentionBatch",
    "resolve",
]
