"""Weight changes that are not low-rank products as they stand, brought to parts.

In this order: exactly, as a product within the bound of ranks; approximately, as PEFT's own
``convert_to_lora`` does it (peft/tuners/lora/conversion.py: the leading singular triplets), where
the error is within ``max_conversion_error`` and reported; exactly again, as a replaced weight,
within ``max_dense_bytes``; else refused with the figures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from manyhats.adapters.formats.builder import Builder
from manyhats.adapters.formats.job import Job
from manyhats.adapters.parts import SiteSpec
from manyhats.errors import AdapterRejectedError

EXACT: Final = 2e-6
"""Error below which a product is the change itself, up to fp32's rounding."""

_OVERSAMPLE: Final = 16
_POWER_STEPS: Final = 3
_NEGLIGIBLE: Final = 1e-6  # of the largest singular value

Triplets = tuple[torch.Tensor, torch.Tensor, float]
"""``a``: [rank, in], ``b``: [rank, out], and the error of b^T a."""


def put_product(
    job: Job, builder: Builder, site: SiteSpec, a: torch.Tensor, b: torch.Tensor, source: str
) -> None:
    """A change b^T a, with ``a``: [R, in] and ``b``: [R, out] in fp32, of whatever rank R."""
    if a.shape[0] <= job.limits.max_rank:
        builder.low_rank(site, a, b, source, source)
        return
    put_triplets(
        job,
        builder,
        site,
        lambda: _compressed(_checked(a, source), _checked(b, source), job.limits.max_rank),
        lambda: b.t() @ a,
        source,
    )


def put_change(
    job: Job, builder: Builder, site: SiteSpec, change: Callable[[], torch.Tensor], source: str
) -> None:
    """A change of the base's weight; ``change`` computes it in fp32, [out, in]."""
    put_triplets(
        job,
        builder,
        site,
        lambda: _leading(_checked(change(), source), job.limits.max_rank),
        change,
        source,
    )


def put_triplets(
    job: Job,
    builder: Builder,
    site: SiteSpec,
    triplets: Callable[[], Triplets],
    change: Callable[[], torch.Tensor],
    source: str,
) -> None:
    """A change that ``triplets`` brings near by a product within the bound of ranks."""

    def compute() -> dict[str, torch.Tensor]:
        try:
            a, b, error = triplets()
        except RuntimeError as failure:  # torch.linalg.LinAlgError, which is not exported
            if type(failure).__name__ != "_LinAlgError":
                raise
            raise AdapterRejectedError(
                "non_finite", f"{source}: the weight change has no singular values in fp32"
            ) from None
        found = {"error": torch.tensor([error])}
        return found | {"a": a, "b": b} if error <= max(EXACT, limit) else found

    limit = job.limits.max_conversion_error
    name = f"change.{job.limits.max_rank}.{limit}.{site.name}"
    found = job.derived.get(name, compute)
    error = float(found["error"])
    if error <= max(EXACT, limit):
        builder.low_rank(site, found["a"], found["b"], source, source)
        if error > EXACT:
            builder.converted(error)
    elif builder.can_hold(site.in_features * site.out_features):
        weight = job.base_weight(site) + _checked(change(), source)
        builder.dense(site, weight, source)
    else:
        raise AdapterRejectedError(
            "rank_too_large",
            f"{source}: the best product of rank {job.limits.max_rank} leaves out {error:.2g} of "
            f"the change, over the bound of {limit:g} (max_conversion_error), and to replace the "
            f"weight would pass the bound of {job.limits.max_dense_bytes} bytes (max_dense_bytes)",
        )


def _checked(delta: torch.Tensor, source: str) -> torch.Tensor:
    if not bool(torch.isfinite(delta).all()):
        raise AdapterRejectedError("non_finite", f"{source}: the weight change does not fit fp32")
    return delta


def _compressed(a: torch.Tensor, b: torch.Tensor, bound: int) -> Triplets:
    """The best product of rank ``bound``, by the singular values of the small core."""
    qa, ra = torch.linalg.qr(a.double().t())
    qb, rb = torch.linalg.qr(b.double().t())
    u, s, vh = torch.linalg.svd(rb @ ra.t(), full_matrices=False)
    keep = min(bound, _significant(s))
    whole, left = torch.linalg.norm(s), torch.linalg.norm(s[keep:])
    error = float(left / whole) if float(whole) > 0 else 0.0
    kept_a, kept_b = vh[:keep] @ qa.t(), (u[:, :keep] * s[:keep]).t() @ qb.t()
    return kept_a.float(), kept_b.float(), error


def _leading(delta: torch.Tensor, bound: int) -> Triplets:
    """The leading singular triplets of a change, exactly or, of a large one, by random projection
    (Halko, Martinsson, Tropp: arXiv:0909.4061); the error is that of what is returned.
    """
    width = bound + _OVERSAMPLE
    if min(delta.shape) <= 4 * width:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(0)
        q = torch.linalg.qr(delta @ torch.randn((delta.shape[1], width), generator=generator))[0]
        for _ in range(_POWER_STEPS):
            q = torch.linalg.qr(delta @ torch.linalg.qr(delta.t() @ q)[0])[0]
        u, s, vh = torch.linalg.svd(q.t() @ delta, full_matrices=False)
        u = q @ u
    keep = min(bound, _significant(s))
    a, b = vh[:keep], (u[:, :keep] * s[:keep]).t()
    whole = torch.linalg.norm(delta)
    left = torch.linalg.norm(delta - b.t() @ a)
    return a, b, float(left / whole) if float(whole) > 0 else 0.0


def _significant(s: torch.Tensor) -> int:
    return int((s > s[0] * _NEGLIGIBLE).sum())
