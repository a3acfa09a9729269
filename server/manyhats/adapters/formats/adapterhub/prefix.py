"""Prefix tuning as AdapterHub saves it (methods/prefix_tuning.py): a vector, or an MLP that is
evaluated here.

AdapterHub puts the prefix before the keys after they were rotated, and counts positions from the
first token of the prompt. Here a prefix has the positions before the prompt, so its n tokens' keys
are rotated by n: what a query at p reads from them is then the same, as rotations depend on the
difference alone. Where positions are embeddings nothing makes up for them, and where a window
hides old keys it would hide these, which AdapterHub does not; both are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import torch
from torch.nn import functional

from manyhats.adapters.formats.adapterhub.bottleneck import ACTIVATIONS, GATED
from manyhats.adapters.formats.adapterhub.places import Names, left_out
from manyhats.adapters.formats.adapterhub.setup import Method
from manyhats.adapters.formats.builder import Builder
from manyhats.adapters.formats.fields import bad, boolean, check_values, field_table, positive
from manyhats.adapters.formats.inner import inner_rank
from manyhats.adapters.formats.job import Job, Section, Shape
from manyhats.adapters.formats.prefix import prefix_sites
from manyhats.adapters.parts import Activation, SiteKind, SiteSpec
from manyhats.errors import AdapterRejectedError

TABLE: Final = field_table(
    {"architecture", "leave_out", "flat", "prefix_length", "bottleneck_size", "non_linearity"},
    {
        "encoder_prefix": "a decoder has no encoder",
        "cross_prefix": "a decoder has no cross attention",
        "dropout": "of training",
        "init_weights_seed": "how training began",
        "shared_gating": "of use_gating, which is refused",
    },
    {"use_gating": GATED},
)
_FUNCTIONS: Final[Mapping[Activation, Callable[[torch.Tensor], torch.Tensor]]] = {
    Activation.RELU: torch.relu,
    Activation.GELU: functional.gelu,
    Activation.GELU_TANH: partial(functional.gelu, approximate="tanh"),
    Activation.SILU: functional.silu,
    Activation.TANH: torch.tanh,
    Activation.LEAKY_RELU: functional.leaky_relu,
    Activation.IDENTITY: torch.clone,
}


def prefix_tokens(job: Job, method: Method) -> int:
    """``prefix_length`` within the bound; also checks the fields."""
    check_values(method.config, TABLE.refused, TABLE.own)
    tokens = positive("prefix_length", method.config.get("prefix_length", 30))
    bound = job.limits.max_virtual_tokens
    if tokens > bound:
        raise AdapterRejectedError(
            "too_large",
            f"prefix_length is {tokens}, over the bound of {bound} (max_virtual_tokens)",
            param="prefix_length",
        )
    return tokens


def prefix_section(job: Job, names: Names, method: Method) -> Section:
    """The prefix of every layer.

    Raises:
        AdapterRejectedError: ``unsupported_feature``, ``unsupported_site``, ``bad_config``,
            ``too_large``, ``rank_too_large``.
    """
    tokens, config = prefix_tokens(job, method), method.config
    if left_out(config) & set(range(len(names.layers))):
        raise AdapterRejectedError(
            "unsupported_feature",
            "a prefix that is left out of some layers is not served (leave_out is set)",
            param="leave_out",
        )
    sites = prefix_sites(job)
    if not names.layout.rotates or any(site.rotary is None for site in sites):
        raise AdapterRejectedError(
            "unsupported_site",
            "AdapterHub's prefixes take no positions, which can be made up for only where all "
            "keys are rotated by fixed frequencies and stay in view; this base is not of that kind",
        )
    place = names.tensor(f"{names.root}prefix_tuning.prefix_tunings.{method.adapter}.self_prefix")
    size = 2 * len(sites) * sites[0].in_features * sites[0].out_features
    shapes = _shapes(job, config, place, tokens, size)
    return Section(shapes, partial(_build, job, config, place, sites, tokens))


def _shapes(
    job: Job, config: Mapping[str, object], place: str, tokens: int, size: int
) -> dict[str, Shape]:
    first, second = f"{place}.control_trans.0", f"{place}.control_trans.2"
    if boolean(config, "flat"):
        return {f"{place}.control_trans": (tokens * size,)}
    width = inner_rank(job, "bottleneck_size", config.get("bottleneck_size", 512))
    hidden = _hidden(job)
    return {
        f"{place}.wte.weight": (tokens, hidden),
        f"{first}.weight": (width, hidden),
        f"{first}.bias": (width,),
        f"{second}.weight": (size, width),
        f"{second}.bias": (size,),
    }


def _hidden(job: Job) -> int:
    return next(s.out_features for s in job.base.sites.values() if s.kind is SiteKind.EMBEDDING)


def _build(
    job: Job,
    config: Mapping[str, object],
    place: str,
    sites: list[SiteSpec],
    tokens: int,
    builder: Builder,
) -> None:
    source = f"{place}.control_trans"
    if boolean(config, "flat"):
        whole = job.tensor(source)
    else:
        name = config.get("non_linearity", "tanh")
        kind = ACTIVATIONS.get(name.lower()) if isinstance(name, str) else None
        if kind is None:
            raise bad("non_linearity", name, f"one of {', '.join(ACTIVATIONS)}")
        first, source = f"{place}.control_trans.0", f"{place}.control_trans.2"
        inner = functional.linear(
            job.tensor(f"{place}.wte.weight"),
            job.tensor(f"{first}.weight"),
            job.tensor(f"{first}.bias"),
        )
        whole = functional.linear(
            _FUNCTIONS[kind](inner),
            job.tensor(f"{source}.weight"),
            job.tensor(f"{source}.bias"),
        )
    states = whole.reshape(tokens, len(sites), 2, sites[0].in_features, sites[0].out_features)
    for layer, site in enumerate(sites):
        keys = _rotated(states[:, layer, 0], site.rotary, tokens)
        builder.prefix(site, keys, states[:, layer, 1], source)


def _rotated(keys: torch.Tensor, frequencies: torch.Tensor | None, by: int) -> torch.Tensor:
    """[tokens, heads, dim], every key rotated by ``by`` positions, by halves as Llama rotates."""
    if frequencies is None:
        return keys
    half = len(frequencies)
    angle = frequencies.float() * by
    cos, sin = angle.cos(), angle.sin()
    first, second, rest = keys[..., :half], keys[..., half : 2 * half], keys[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
