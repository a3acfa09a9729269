"""The matrices of a bottleneck: plain, or sums of Kronecker products (Compacter, arXiv:2106.04647).

A PHM layer computes y = x H + b with H = sum_i A_i (x) W_i, A_i: [n, n], W_i: [in/n, out/n], both
possibly a product of two factors and possibly shared between layers (PHMLayer in
adapters/methods/modeling.py). H is expanded once, here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from manyhats.adapters.formats.adapterhub.setup import Method
from manyhats.adapters.formats.fields import bad, boolean, positive
from manyhats.adapters.formats.inner import inner_rank
from manyhats.adapters.formats.job import Job, Shape

HONOURED: Final = frozenset(
    {
        "phm_layer",
        "phm_dim",
        "phm_rank",
        "phm_bias",
        "factorized_phm_W",
        "shared_W_phm",
        "shared_phm_rule",
        "factorized_phm_rule",
    }
)
IRRELEVANT: Final = dict.fromkeys(
    ("phm_c_init", "phm_init_range", "hypercomplex_nonlinearity", "learn_phm"), "of training"
)


@dataclass(frozen=True, slots=True)
class Matrix:
    """[in, out], of ``numel`` values, and its bias: what is in the file for them.

    ``rule`` and ``core`` are of a PHM layer, the names of A and W or of their factors; ``weight``
    is that of a plain one, stored [out, in].
    """

    numel: int
    shapes: Mapping[str, Shape]
    bias: str | None
    weight: str = ""
    rule: tuple[str, ...] = ()
    core: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """What a refusal names."""
        return self.weight or self.core[0]

    def load(self, job: Job) -> torch.Tensor:
        """[in, out], fp32."""
        if self.weight:
            return job.tensor(self.weight).t()
        rule, core = _product(job, self.rule), _product(job, self.core)
        n, rows, columns = core.shape
        expanded = torch.einsum("nij,nkl->ikjl", rule, core)
        return expanded.reshape(n * rows, n * columns)

    def load_bias(self, job: Job) -> torch.Tensor | None:
        """[out], fp32."""
        return None if self.bias is None else job.tensor(self.bias)


def plain(place: str, size_in: int, size_out: int) -> Matrix:
    """A ``nn.Linear`` called ``place``."""
    weight, bias = f"{place}.weight", f"{place}.bias"
    return Matrix(
        size_in * size_out, {weight: (size_out, size_in), bias: (size_out,)}, bias, weight
    )


def kronecker(
    job: Job, method: Method, place: str, shared: str, position: str, sizes: tuple[int, int]
) -> Matrix:
    """A PHM layer called ``place``; what its method shares begins with ``shared``. ``position``:
    down or up.
    """
    config = method.config
    size_in, size_out = sizes
    n = positive("phm_dim", config.get("phm_dim", 4))
    if size_in % n or size_out % n:
        raise bad("phm_dim", n, f"a divisor of {size_in} and {size_out}")
    rank = inner_rank(job, "phm_rank", config.get("phm_rank", 1))
    shapes: dict[str, Shape] = {}
    own_core = not boolean(config, "shared_W_phm")
    core_place = f"{place}.W" if own_core else f"{shared}.W_{position}"
    factors = ((n, size_in // n, rank), (n, rank, size_out // n))
    whole = (n, size_in // n, size_out // n)
    core = _named(shapes, core_place, boolean(config, "factorized_phm_W", True), factors, whole)
    rule_place = f"{shared}.phm_rule"
    if not boolean(config, "shared_phm_rule", True):
        rule_place = f"{place}.phm_rule"
    factorized = boolean(config, "factorized_phm_rule")
    rule = _named(shapes, rule_place, factorized, ((n, n, 1), (n, 1, n)), (n, n, n))
    bias = f"{place}.b" if boolean(config, "phm_bias", True) else None
    if bias is not None:
        shapes[bias] = (size_out,)
    return Matrix(size_in * size_out, shapes, bias, rule=rule, core=core)


def _named(
    shapes: dict[str, Shape],
    place: str,
    factorized: bool,
    factors: tuple[Shape, Shape],
    whole: Shape,
) -> tuple[str, ...]:
    if not factorized:
        shapes[place] = whole
        return (place,)
    left, right = f"{place}_left", f"{place}_right"
    shapes[left], shapes[right] = factors
    return left, right


def _product(job: Job, names: tuple[str, ...]) -> torch.Tensor:
    first = job.tensor(names[0])
    return first if len(names) == 1 else torch.bmm(first, job.tensor(names[1]))
