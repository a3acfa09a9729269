"""Low-rank products that lie in the file as they are: A, and B to be turned around and scaled.

An adapter has hundreds of them, so many small tensors that calls cost more than arithmetic. Those
of one shape are put in the parts' dtype together, a stack at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from manyhats.adapters.finite import all_finite
from manyhats.adapters.formats.builder import Builder
from manyhats.adapters.formats.job import Job
from manyhats.adapters.parts import SiteSpec

_STACK_VALUES: Final = 1 << 19
"""Of one side's tensors in a stack: what is computed on the way stays in a core's cache."""


@dataclass(frozen=True, slots=True)
class Product:
    """A site's product by its tensors' names: ``a`` is [rank, in] and ``b`` [out, rank] in the
    file; the part holds ``factor`` B^T.
    """

    site: SiteSpec
    a: str
    b: str
    factor: float


def put_products(job: Job, builder: Builder, products: Sequence[Product]) -> None:
    """Put them to ``builder``, those of rank 0 left out.

    Scaled in fp32, before the one rounding to the parts' dtype. Raises AdapterRejectedError
    ``non_finite``, naming the tensor.
    """
    for stack in _stacks(job, products):
        names_a, names_b = [p.a for p in stack], [p.b for p in stack]
        a = _scaled(job, names_a, 1.0)
        b = _scaled(job, names_b, stack[0].factor).transpose(1, 2).contiguous()
        for product, own_a, own_b in zip(stack, a.unbind(), b.unbind(), strict=True):
            builder.product(product.site, own_a, own_b)


def _stacks(job: Job, products: Sequence[Product]) -> Iterator[list[Product]]:
    """The products by module, shape, dtype and factor, as many together as fit a stack, each in
    the file's order.
    """
    alike: dict[tuple[object, ...], list[Product]] = {}
    tensors = job.weights.tensors
    for product in products:
        a, b = tensors[product.a], tensors[product.b]
        if a.shape[0]:
            leaf = product.site.name.rpartition(".")[2]  # these lie at even distances
            kind = (leaf, a.shape, b.shape, a.dtype, b.dtype, product.factor)
            alike.setdefault(kind, []).append(product)
    for group in alike.values():
        group.sort(key=lambda product: tensors[product.b].begin)
        largest = max(tensors[group[0].a].numel, tensors[group[0].b].numel)
        count = max(1, _STACK_VALUES // largest)
        for first in range(0, len(group), count):
            yield group[first : first + count]


def _scaled(job: Job, names: Sequence[str], factor: float) -> torch.Tensor:
    """The tensors, times ``factor``, in the parts' dtype, as one: [names, ...]. A view of the file
    where nothing is to be computed.
    """
    stack = job.weights.load_alike(names)
    if factor == 1.0 and stack.dtype == job.dtype:
        return stack  # finite, as all that is read
    if factor != 1.0:
        stack = stack.to(torch.float32) * factor  # not in place: it may be the file's memory
    stack = stack.to(job.dtype)
    if not all_finite(stack):
        for name, own in zip(names, stack.unbind(), strict=True):
            job.check_fits(own, name)
    return stack
