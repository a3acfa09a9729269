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

__all__ = [
    "ACTIVATIONS",
    "GATED",
    "AdapterBatch",
    "AttentionBatch",
    "Backend",
    "BackendUnavailableError",
    "Resolved",
    "SiteRows",
    "resolve",
]
