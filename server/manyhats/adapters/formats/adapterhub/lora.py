"""LoRA and (IA)^3 as AdapterHub saves them (LoRALinear, LoRAMergedLinear in methods/lora.py).

LoRA's scale is alpha / r. In a stack the second reads what the first put out, and the last alone
is added to the layer: s2 B2 A2 s1 B1 A1 x. (IA)^3 multiplies the whole output, the base's bias with
it, by alpha times its vector; in a stack the vectors multiply. GPT-2's one module for q, k and v
has an A and a B for each of those that are adapted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch

from manyhats.adapters.formats.adapterhub.bottleneck import GATED
from manyhats.adapters.formats.adapterhub.places import Names
from manyhats.adapters.formats.adapterhub.setup import Method, used_twice
from manyhats.adapters.formats.builder import Builder
from manyhats.adapters.formats.fields import (
    Refusal,
    boolean,
    check_values,
    field_table,
    name_list,
    number,
    rank,
    text,
)
from manyhats.adapters.formats.job import Job, Section, Shape
from manyhats.adapters.parts import SiteKind, SiteSpec
from manyhats.errors import AdapterRejectedError

TABLE: Final = field_table(
    {
        "architecture",
        "selfattn_lora",
        "intermediate_lora",
        "output_lora",
        "leave_out",
        "r",
        "alpha",
        "attn_matrices",
        "composition_mode",
    },
    {
        "dropout": "of training",
        "init_weights": "how training began",
        "init_weights_seed": "how training began",
        "dtype": "the tensors' own dtype decides",
    },
    {
        "use_gating": GATED,
        "use_dora": Refusal("AdapterHub's DoRA", (False,)),
        "vera_d": Refusal("AdapterHub's VeRA", ()),
        "vera_b": Refusal("AdapterHub's VeRA", ()),
    },
)
_QKV: Final = ("q", "k", "v")


@dataclass(frozen=True, slots=True)
class _Placed:
    """One adapter at one module. ``thirds``: which of q, k and v, of a module that computes all
    three; empty elsewhere. ``a`` is empty for (IA)^3.
    """

    a: str
    b: str
    rank: int
    scaling: float
    thirds: tuple[int, ...]

    def shapes(self, site: SiteSpec) -> dict[str, Shape]:
        """What must be in the file."""
        count = len(self.thirds)
        rows = site.out_features // 3 * count if count else site.out_features
        shapes: dict[str, Shape] = {self.b: (rows, self.rank)}
        if self.a:
            shapes[self.a] = (self.rank * max(1, count), site.in_features)
        return shapes


def lora_sections(
    job: Job, names: Names, methods: Sequence[Method], stacked: bool
) -> list[Section]:
    """``methods`` in the order of the stack; ``stacked``: there is more than one adapter.

    Raises:
        AdapterRejectedError: ``bad_config``, ``unsupported_feature``, ``unsupported_site``,
            ``rank_too_large``.
    """
    found: dict[str, tuple[SiteSpec, list[_Placed]]] = {}
    for method in methods:
        check_values(method.config, TABLE.refused, TABLE.own)
        for layer in names.worn(method):
            for module, thirds in _modules(method, names):
                if thirds and stacked:
                    raise AdapterRejectedError(
                        "unsupported_feature",
                        f"{module} computes q, k and v; AdapterHub composes no LoRA there",
                    )
                site = names.site(f"{layer}.{module}", SiteKind.LINEAR)
                entry = found.setdefault(site.name, (site, []))
                placed = _placed(job, names, method, site, thirds)
                if any(item.b == placed.b for item in entry[1]):
                    raise used_twice(site.name)
                entry[1].append(placed)
    sections = []
    for site, chain in found.values():
        if len(chain) > 1:
            _check_chain(site, chain)
        shapes = {name: shape for item in chain for name, shape in item.shapes(site).items()}
        sections.append(Section(shapes, partial(_build, job, site, chain)))
    return sections


def _check_chain(site: SiteSpec, placed: Sequence[_Placed]) -> None:
    if len({bool(item.a) for item in placed}) > 1:
        raise AdapterRejectedError(
            "unsupported_feature",
            f"{site.name}: LoRA and (IA)^3 stacked at one module are not served",
            param="composition_mode",
        )
    if placed[0].a and site.in_features != site.out_features:
        raise AdapterRejectedError(
            "unsupported_feature",
            f"{site.name}: stacked LoRA reads what the one before put out, and this module's "
            "inputs and outputs differ in size",
        )


def _modules(method: Method, names: Names) -> list[tuple[str, tuple[int, ...]]]:
    """The modules within a layer, and which of q, k and v of a merged one."""
    config, layout = method.config, names.layout
    found: list[tuple[str, tuple[int, ...]]] = []
    if boolean(config, "selfattn_lora", True):
        wanted = name_list(config, "attn_matrices") if "attn_matrices" in config else ("q", "v")
        if layout.merged is not None:
            thirds = tuple(i for i, key in enumerate(_QKV) if key in wanted)
            if thirds:
                found.append((layout.merged, thirds))
        else:
            found += [(module, ()) for key, module in layout.attention.items() if key in wanted]
    if boolean(config, "intermediate_lora"):
        found.append((layout.intermediate, ()))
    if boolean(config, "output_lora"):
        found.append((layout.output, ()))
    return found


def _placed(
    job: Job, names: Names, method: Method, site: SiteSpec, thirds: tuple[int, ...]
) -> _Placed:
    config = method.config
    place = names.tensor(f"{site.name}.loras.{method.adapter}")
    r = rank("r", config.get("r", 8), job.limits)
    if r * len(thirds) > job.limits.max_rank:
        raise AdapterRejectedError(
            "rank_too_large",
            f"r is {r} for {len(thirds)} of q, k and v in one module: {r * len(thirds)} together, "
            f"over the bound of {job.limits.max_rank} (max_rank)",
            param="r",
        )
    alpha = number("alpha", config.get("alpha", 8))
    if text(config, "composition_mode", "add", ("add", "scale")) == "add":
        scaling = 1.0 if method.old_scaling else alpha / r
        return _Placed(f"{place}.lora_A", f"{place}.lora_B", r, scaling, thirds)
    if r != 1:
        raise AdapterRejectedError("bad_config", f"r is {r}; (IA)^3 has r 1", param="r")
    return _Placed("", f"{place}.lora_B", 1, alpha, thirds)


def _build(job: Job, site: SiteSpec, placed: Sequence[_Placed], builder: Builder) -> None:
    first = placed[0]
    if not first.a:
        scale = torch.ones(site.out_features)
        for item in placed:
            part = job.tensor(item.b).flatten() * item.scaling
            scale = scale * _spread(part[None], item.thirds, site, fill=1.0)[0]
        builder.scale_output(site, scale, first.b)
        return
    a, b = job.tensor(first.a), _rows(job, first, site)
    for item in placed[1:]:
        b = (b @ job.tensor(item.a).t()) @ _rows(job, item, site)
    builder.low_rank(site, a, b, first.a, first.b)


def _rows(job: Job, item: _Placed, site: SiteSpec) -> torch.Tensor:
    """B as [rank, out], scaled; of a merged module a block for each third that is adapted."""
    b = job.tensor(item.b) * item.scaling
    if not item.thirds:
        return b.t()
    blocks = b.new_zeros(len(item.thirds), item.rank, len(b))
    size = len(b) // len(item.thirds)
    for index in range(len(item.thirds)):
        rows = slice(index * size, (index + 1) * size)
        blocks[index, :, rows] = b[rows].t()
    return _spread(blocks.flatten(0, 1), item.thirds, site, fill=0.0)


def _spread(
    rows: torch.Tensor, thirds: tuple[int, ...], site: SiteSpec, *, fill: float
) -> torch.Tensor:
    """[n, a third for each of ``thirds``] as [n, out]."""
    if not thirds:
        return rows
    whole = rows.new_full((len(rows), 3, site.out_features // 3), fill)
    whole[:, list(thirds)] = rows.reshape(len(rows), len(thirds), -1)
    return whole.flatten(1)
