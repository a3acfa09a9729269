"""Several compiled adapters as one: what a composition's parts are.

- stack: each member over the base that wears those before it, as PEFT has several active adapters.
  At a linear layer, with a before b, y = g_b * (layer_a(s_b * x) + low_rank_b(s_b * x)) + bias_b,
  where s and g are the input and output scales. That is one layer again: s = s_a * s_b, g = g_a *
  g_b, both low-rank products side by side (b's with A / s_a and B / g_a) and the bias g_b *
  bias_a + bias_b. Biases of norms are summed, bottlenecks run one after the other, prefixes and
  soft prompts follow each other; of two replaced rows the later one holds.
- weighted: low-rank products side by side, B multiplied by the weight (PEFT's
  ``add_weighted_adapter`` with ``combination_type="cat"``), and biases summed by weight.

Everything else has no one meaning and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Final

import torch

from manyhats.adapters.files import AdapterLimits
from manyhats.adapters.finite import all_finite
from manyhats.adapters.parts import CompiledAdapter, LowRank, Prefix, Rows, SiteParts
from manyhats.errors import AdapterRejectedError
from manyhats.types import AdapterRef, Composition, CompositionKind, Digest

_SUMMED: Final = frozenset({"low_rank", "bias"})
"""The parts that are linear in the adapter, so that a weighted sum of them is defined."""
_LAYER: Final = (
    "low_rank", "bias", "input_scale", "output_scale", "gain", "dense", "rows",
)  # fmt: skip
"""The parts that change what a module itself puts out."""


def compose(
    ref: AdapterRef,
    composition: Composition,
    members: Sequence[CompiledAdapter],
    limits: AdapterLimits,
) -> CompiledAdapter:
    """One adapter that does what ``members``, those of the composition, do together.

    ``ref`` is what the result is called by. It shares tensors with the members where it can. The
    bounds of one adapter hold for the whole.

    Raises:
        AdapterRejectedError: ``cannot_compose``, naming the adapters, the site and the parts;
            ``rank_too_large``, ``too_large``, ``non_finite``.
        ValueError: An ensemble, which is no one adapter.
    """
    if composition.kind is CompositionKind.ENSEMBLE:
        raise ValueError(f"{ref} has no parts of its own: its members run side by side")
    weights = composition.weights or (1.0,) * len(members)
    sites: dict[str, SiteParts] = {}
    for name in dict.fromkeys(site for member in members for site in member.sites):
        worn = [
            _Worn(str(member_ref), member.sites[name], weight)
            for member_ref, member, weight in zip(
                composition.members, members, weights, strict=True
            )
            if name in member.sites
        ]
        whole = _weighted if composition.kind is CompositionKind.WEIGHTED else _stacked
        sites[name] = whole(name, worn)
    _check_virtual(composition, sites)
    _check_bounds(ref, sites, limits)
    return CompiledAdapter(
        digest=Digest(ref.digest),
        family=composition.kind.value,
        sites=sites,
        virtual_tokens=sum(member.virtual_tokens for member in members),
    )


@dataclass(frozen=True, slots=True)
class _Worn:
    """A member's parts at one site."""

    adapter: str
    parts: SiteParts
    weight: float


def present(parts: SiteParts) -> list[str]:
    """Names of the parts that are there."""
    values = {f.name: getattr(parts, f.name) for f in fields(parts)}
    return [name for name, value in values.items() if value is not None and value != ()]


def _weighted(site: str, worn: Sequence[_Worn]) -> SiteParts:
    """The sum of the members' parts by weight; the products are put side by side."""
    for item in worn:
        other = [part for part in present(item.parts) if part not in _SUMMED]
        if other:
            raise AdapterRejectedError(
                "cannot_compose",
                f"{item.adapter} has {_listed(other)} at {site}: a weighted sum is defined for "
                "low-rank products and biases alone",
                param="adapter",
            )
    products = [
        replace(p, b=_product(site, p.b, item.weight))
        for item in worn
        if (p := item.parts.low_rank) is not None
    ]
    biases = [(b, item.weight) for item in worn if (b := item.parts.bias) is not None]
    total = sum((b.float() * weight for b, weight in biases), torch.zeros(()))
    return SiteParts(
        low_rank=_side_by_side(products),
        bias=_cast(site, total, like=biases[0][0]) if biases else None,
    )


def _stacked(site: str, worn: Sequence[_Worn]) -> SiteParts:
    """Each member's parts over those of the members before it."""
    below = worn[0]
    for above in worn[1:]:
        _check_stackable(site, below, above)
        adapter = f"{below.adapter} and {above.adapter}"
        below = _Worn(adapter, _over(site, below, above), 1.0)
    return below.parts


def _check_stackable(site: str, below: _Worn, above: _Worn) -> None:
    a, b = below.parts, above.parts
    changed = [part for part in present(a) if part in _LAYER]
    replaced = [part for part in ("dense", "rows") if getattr(b, part) is not None]
    if replaced and changed and not (changed == replaced == ["rows"]):
        raise _clash(site, below, changed, above, replaced, "would replace what was changed before")
    if a.gain is not None and b.gain is not None:
        raise _clash(site, below, ["gain"], above, ["gain"], "each replaces the norm's weight")
    if (a.fusion is not None and b.bottlenecks) or (b.fusion is not None and a.bottlenecks):
        parts = ["bottlenecks", "fusion"]
        raise _clash(site, below, parts, above, parts, "a fusion chooses among its own alone")
    for scale in ("input_scale", "output_scale"):
        own = getattr(a, scale)
        if own is not None and b.low_rank is not None and not bool(own.all()):
            raise _clash(site, below, [scale], above, ["low_rank"], "a scale of zero hides it")


def _over(site: str, below: _Worn, above: _Worn) -> SiteParts:
    """One layer that does what ``above`` does over the layer that wears ``below``."""
    a, b = below.parts, above.parts
    products = [p for p in (a.low_rank, _through(site, a, b.low_rank)) if p is not None]
    bias = a.bias
    if bias is not None and b.output_scale is not None:
        bias = _product(site, bias, b.output_scale)
    return SiteParts(
        low_rank=_side_by_side(products),
        bias=_either(site, bias, b.bias, torch.add),
        input_scale=_either(site, a.input_scale, b.input_scale, torch.mul),
        output_scale=_either(site, a.output_scale, b.output_scale, torch.mul),
        gain=b.gain if a.gain is None else a.gain,
        dense=b.dense if a.dense is None else a.dense,
        rows=_rows(a.rows, b.rows),
        soft_prompt=_either(site, a.soft_prompt, b.soft_prompt, _end_to_end),
        prefix=_prefix(a.prefix, b.prefix),
        bottlenecks=(*a.bottlenecks, *b.bottlenecks),
        fusion=b.fusion if a.fusion is None else a.fusion,
    )


def _through(site: str, below: SiteParts, product: LowRank | None) -> LowRank | None:
    """``product`` so that the scales of the layer below it, which reach it as well, cancel out."""
    if product is None or (below.input_scale is None and below.output_scale is None):
        return product
    a, b = product.a, product.b
    if below.input_scale is not None:
        a = _cast(site, a.float() / below.input_scale.float(), like=a)
    if below.output_scale is not None:
        b = _cast(site, b.float() / below.output_scale.float(), like=b)
    return LowRank(a, b)


def _side_by_side(products: Sequence[LowRank]) -> LowRank | None:
    if len(products) < 2:
        return products[0] if products else None
    return LowRank(torch.cat([p.a for p in products]), torch.cat([p.b for p in products]))


def _end_to_end(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.cat((a, b))


def _either(
    site: str,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    both: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor | None:
    """``both`` of the two in fp32, or the one that is there."""
    if a is None or b is None:
        return a if b is None else b
    return _cast(site, both(a.float(), b.float()), like=a)


def _rows(a: Rows | None, b: Rows | None) -> Rows | None:
    if a is None or b is None:
        return a if b is None else b
    kept = ~torch.isin(a.token_ids, b.token_ids)
    ids = torch.cat((a.token_ids[kept], b.token_ids))
    order = ids.argsort()
    return Rows(ids[order], torch.cat((a.vectors[kept], b.vectors))[order].contiguous())


def _prefix(a: Prefix | None, b: Prefix | None) -> Prefix | None:
    if a is None or b is None:
        return a if b is None else b
    return Prefix(torch.cat((a.k, b.k)), torch.cat((a.v, b.v)))


def _product(site: str, tensor: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    scale = factor.float() if isinstance(factor, torch.Tensor) else factor
    return _cast(site, tensor.float() * scale, like=tensor)


def _cast(site: str, values: torch.Tensor, *, like: torch.Tensor) -> torch.Tensor:
    cast = values.to(like.dtype).contiguous()
    if not all_finite(cast):
        dtype = str(like.dtype).removeprefix("torch.")
        raise AdapterRejectedError(
            "non_finite", f"{site}: the members' parts together do not fit {dtype}", param="adapter"
        )
    return cast


def _clash(
    site: str,
    below: _Worn,
    of_below: Sequence[str],
    above: _Worn,
    of_above: Sequence[str],
    why: str,
) -> AdapterRejectedError:
    return AdapterRejectedError(
        "cannot_compose",
        f"{below.adapter} has {_listed(of_below)} and {above.adapter} {_listed(of_above)} at "
        f"{site}: {why}",
        param="adapter",
    )


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(parts)


def _check_virtual(composition: Composition, sites: Mapping[str, SiteParts]) -> None:
    soft = any(parts.soft_prompt is not None for parts in sites.values())
    if soft and any(parts.prefix is not None for parts in sites.values()):
        names = ", ".join(str(ref) for ref in composition.members if ref.virtual_tokens)
        raise AdapterRejectedError(
            "cannot_compose",
            f"{names}: a soft prompt and a prefix cannot both come before the prompt",
            param="adapter",
        )


def _check_bounds(ref: AdapterRef, sites: Mapping[str, SiteParts], limits: AdapterLimits) -> None:
    if ref.virtual_tokens > limits.max_virtual_tokens:
        raise AdapterRejectedError(
            "too_large",
            f"{ref} has {ref.virtual_tokens} virtual tokens, the bound is "
            f"{limits.max_virtual_tokens} (max_virtual_tokens)",
            param="adapter",
        )
    for name, parts in sites.items():
        rank = parts.low_rank.rank if parts.low_rank is not None else 0
        if rank > limits.max_rank:
            raise AdapterRejectedError(
                "rank_too_large",
                f"{ref} has rank {rank} at {name}, the bound is {limits.max_rank} (max_rank)",
                param="adapter",
            )
    replaced = [parts.dense for parts in sites.values() if parts.dense is not None]
    dense = sum(weight.numel() * weight.element_size() for weight in replaced)
    if dense > limits.max_dense_bytes:
        raise AdapterRejectedError(
            "too_large",
            f"{ref} replaces weights of {dense} bytes, the bound is {limits.max_dense_bytes} "
            "(max_dense_mb)",
            param="adapter",
        )
