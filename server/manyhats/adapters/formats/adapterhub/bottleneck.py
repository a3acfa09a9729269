"""Bottlenecks: Houlsby, Pfeiffer, parallel and Compacter, alone or stacked.

In adapters/methods/bottleneck.py and modeling.py a block's output o and the stream r that entered
it go through the adapters as a hidden state h, at first o. A sequential adapter reads x = h + r
(``original_ln_before``; there is no norm to apply in these decoders) or x = h, and leaves
h = d(x) + its residual, which is h as it came, or with ``residual_before_ln`` false x. A parallel
one reads r and leaves d(r), to which o is added behind the last. ``original_ln_after`` of the last
adds r. A setup that thereby leaves anything but r + o + d once is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from manyhats.adapters.formats.adapterhub import phm
from manyhats.adapters.formats.adapterhub.places import RESIDUAL_PLACES, Names
from manyhats.adapters.formats.adapterhub.setup import Method, used_twice
from manyhats.adapters.formats.builder import Builder
from manyhats.adapters.formats.fields import (
    Refusal,
    bad,
    boolean,
    check_values,
    field_table,
    number,
    text,
)
from manyhats.adapters.formats.inner import MAX_INNER
from manyhats.adapters.formats.job import Job, Section, Shape
from manyhats.adapters.parts import Activation, Bottleneck, SiteKind, SiteSpec
from manyhats.adapters.strict_json import shown
from manyhats.errors import AdapterRejectedError

GATED: Final = Refusal(
    "a gate that is averaged over the whole sequence, later tokens included (use_gating)", (False,)
)
TABLE: Final = field_table(
    {
        "architecture",
        "mh_adapter",
        "output_adapter",
        "reduction_factor",
        "non_linearity",
        "original_ln_before",
        "original_ln_after",
        "residual_before_ln",
        "is_parallel",
        "scaling",
        "leave_out",
        *phm.HONOURED,
    },
    {
        **phm.IRRELEVANT,
        "init_weights": "how training began",
        "init_weights_seed": "how training began",
        "dropout": "of training",
        "stochastic_depth": "of training",
        "cross_adapter": "a decoder has no cross attention",
        "adapter_residual_before_ln": "of ln_after, which is refused",
        "inv_adapter_reduction_factor": "of inv_adapter, which is refused",
    },
    {
        "ln_before": Refusal("a norm inside a bottleneck (ln_before)", (False,)),
        "ln_after": Refusal("a norm inside a bottleneck (ln_after)", (False,)),
        "inv_adapter": Refusal("an invertible adapter behind the embedding", ()),
        "use_gating": GATED,
    },
)
_ALIASES: Final = {"silu": "swish", "gelu_pytorch_tanh": "gelu_new"}
ACTIVATIONS: Final = {activation.value: activation for activation in Activation} | {
    name: Activation(value) for name, value in _ALIASES.items()
}
"""By AdapterHub's names."""


@dataclass(frozen=True, slots=True)
class Placed:
    """One bottleneck at one place; ``scaling`` a number, or the name of a tensor of [1] or
    [hidden].
    """

    method: Method
    down: phm.Matrix
    up: phm.Matrix
    activation: Activation
    scaling: float | str
    scaling_shape: Shape

    @property
    def shapes(self) -> dict[str, Shape]:
        """What must be in the file."""
        shapes = {**self.down.shapes, **self.up.shapes}
        if isinstance(self.scaling, str):
            shapes[self.scaling] = self.scaling_shape
        return shapes

    def load(self, job: Job, *, parallel: bool, of_output: bool) -> Bottleneck:
        """The part, reading what the two flags say."""
        scale = self.scaling if isinstance(self.scaling, float) else job.tensor(self.scaling)
        bias = self.up.load_bias(job)
        down_bias = self.down.load_bias(job)
        up, source = self.up.load(job) * scale, self.up.source
        return Bottleneck(
            down=job.cast(self.down.load(job).t(), self.down.source),
            up=job.cast(up, source),
            activation=self.activation,
            down_bias=None if down_bias is None else job.cast(down_bias, self.down.source),
            up_bias=None if bias is None else job.cast(bias * scale, source),
            parallel=parallel,
            of_output=of_output,
        )


def place_bottlenecks(
    job: Job, names: Names, methods: Sequence[Method]
) -> dict[str, tuple[SiteSpec, list[Placed]]]:
    """By AdapterHub's module (``<layer>.output_adapters``): its residual site and the bottlenecks
    there, in the order of ``methods``.

    Raises:
        AdapterRejectedError: ``bad_config``, ``unsupported_feature``, ``unsupported_site``,
            ``rank_too_large``, ``too_large``.
    """
    found: dict[str, tuple[SiteSpec, list[Placed]]] = {}
    for method in methods:
        check_values(method.config, TABLE.refused, TABLE.own)
        for layer in names.worn(method):
            for field, (module, site_name) in RESIDUAL_PLACES.items():
                if not boolean(method.config, field):
                    continue
                site = names.site(f"{layer}.{site_name}", SiteKind.RESIDUAL)
                entry = found.setdefault(f"{layer}.{module}", (site, []))
                if any(item.method.adapter == method.adapter for item in entry[1]):
                    raise used_twice(site.name)
                index = names.layers.index(layer)
                entry[1].append(_placed(job, names, method, f"{layer}.{module}", index, site))
    _check_bytes(job, [item for _, placed in found.values() for item in placed])
    return found


def _check_bytes(job: Job, placed: Sequence[Placed]) -> None:
    """Kronecker products are small in the file and large once they are expanded."""
    total = 2 * sum(item.down.numel for item in placed) * job.dtype.itemsize
    if total > job.limits.max_bytes:
        raise AdapterRejectedError(
            "too_large",
            f"the bottlenecks take {total} bytes, over the bound of {job.limits.max_bytes} "
            "(max_bytes)",
        )


def bottleneck_sections(
    job: Job, found: Mapping[str, tuple[SiteSpec, list[Placed]]]
) -> list[Section]:
    """One after the other at each place."""
    sections = []
    for site, placed in found.values():
        ways = stream_ways([item.method for item in placed])
        shapes = {name: shape for item in placed for name, shape in item.shapes.items()}
        sections.append(Section(shapes, partial(_build, job, site, placed, ways)))
    return sections


@dataclass(frozen=True, slots=True)
class Way:
    """What a bottleneck reads; see ``Bottleneck``."""

    parallel: bool
    of_output: bool


def stream_ways(methods: Sequence[Method]) -> list[Way]:
    """What each bottleneck of a stack reads, where the stack leaves r + o + every d.

    Raises:
        AdapterRejectedError: ``unsupported_feature`` where it leaves anything else.
    """
    if len(methods) > 1 and any(boolean(method.config, "is_parallel") for method in methods):
        raise AdapterRejectedError(
            "unsupported_feature",
            "a parallel bottleneck stacked with another at the same place loses the output of the "
            "one before it, or the block's own; it is not served",
            param="is_parallel",
        )
    carried, ways = 0, []  # how many times the hidden state holds r
    for method in methods:
        if boolean(method.config, "is_parallel"):
            ways.append(Way(parallel=True, of_output=False))
            continue
        read = carried + boolean(method.config, "original_ln_before")
        if read > 1:
            raise _doubled("original_ln_before")
        ways.append(Way(parallel=False, of_output=read == 0))
        residual = method.config.get("residual_before_ln", True)
        if not isinstance(residual, bool):
            raise bad("residual_before_ln", residual, "true or false")
        if not residual:
            carried = read
    if carried + boolean(methods[-1].config, "original_ln_after", True) != 1:
        raise _doubled("original_ln_after")
    return ways


def _doubled(field: str) -> AdapterRejectedError:
    return AdapterRejectedError(
        "unsupported_feature",
        f"{field}, original_ln_before and residual_before_ln together leave out the stream that "
        "entered the block, or add it twice; this is not served",
        param=field,
    )


def _placed(
    job: Job, names: Names, method: Method, module: str, layer: int, site: SiteSpec
) -> Placed:
    config, hidden = method.config, site.out_features
    width = _width(config.get("reduction_factor"), layer, hidden)
    place = names.tensor(f"{module}.adapters.{method.adapter}")
    if boolean(config, "phm_layer"):
        shared = names.tensor(f"{names.root}shared_parameters.{method.adapter}")
        down, up = (
            phm.kronecker(job, method, f"{place}.{at}", shared, position, sizes)
            for at, position, sizes in (
                ("adapter_down.0", "down", (hidden, width)),
                ("adapter_up", "up", (width, hidden)),
            )
        )
    else:
        down = phm.plain(f"{place}.adapter_down.0", hidden, width)
        up = phm.plain(f"{place}.adapter_up", width, hidden)
    scaling = config.get("scaling", 1.0)
    shape: Shape = ()
    if isinstance(scaling, str):
        text(config, "scaling", "", ("learned", "channel"))
        shape = (1,) if scaling == "learned" else (hidden,)
        scaling = f"{place}.scaling"
    else:
        scaling = number("scaling", scaling)
    name = config.get("non_linearity")
    activation = ACTIVATIONS.get(name.lower()) if isinstance(name, str) else None
    if activation is None:
        raise bad("non_linearity", name, f"one of {', '.join(ACTIVATIONS)}")
    return Placed(method, down, up, activation, scaling, shape)


def _width(value: object, layer: int, hidden: int) -> int:
    """As ``BottleneckLayer.add_adapter`` rounds it."""
    field = "reduction_factor"
    if isinstance(value, dict):
        value = value.get(str(layer), value.get("default"))
    factor = number(field, value)
    if factor <= 0:
        raise bad(field, factor, "a positive number")
    if hidden / factor > MAX_INNER:
        raise AdapterRejectedError(
            "rank_too_large",
            f"{field} is {shown(factor)}: the bottleneck is wider than the bound of {MAX_INNER}",
            param=field,
        )
    return max(1, int(hidden // factor))


def _build(
    job: Job, site: SiteSpec, placed: Sequence[Placed], ways: Sequence[Way], builder: Builder
) -> None:
    parts = [
        item.load(job, parallel=way.parallel, of_output=way.of_output)
        for item, way in zip(placed, ways, strict=True)
    ]
    builder.residual(site, tuple(parts))
