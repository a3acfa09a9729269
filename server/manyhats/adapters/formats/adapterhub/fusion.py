"""AdapterFusion (arXiv:2005.00247): attention of a token over what several bottlenecks give.

``BottleneckLayer.compose_fuse`` lets every member read what the last one would read, and adds
V sum_i p_i d_i to that one's residual; BertFusion in adapters/methods/modeling.py has p. The scores
are not scaled; a ``temperature`` changes with every call of the library and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final

import torch

from manyhats.adapters.formats.adapterhub.bottleneck import Placed, Way, stream_ways
from manyhats.adapters.formats.adapterhub.places import RESIDUAL_PLACES, Names
from manyhats.adapters.formats.adapterhub.setup import Method, Setup
from manyhats.adapters.formats.builder import Builder
from manyhats.adapters.formats.fields import Refusal, boolean, check_values, field_table
from manyhats.adapters.formats.job import Job, Section, Shape
from manyhats.adapters.parts import Fusion, SiteKind, SiteSpec
from manyhats.errors import AdapterRejectedError

TABLE: Final = field_table(
    {"value", "query_before_ln"},
    {
        "regularization": "of training",
        "value_before_softmax": "the value matrix is linear, the order does not matter",
        "value_initialized": "how training began",
        "dropout_prob": "of training",
    },
    {
        "query": Refusal("a fusion without a query matrix", (True,)),
        "key": Refusal("a fusion without a key matrix", (True,)),
        "residual_before": Refusal("a fusion over residuals (residual_before)", (False,)),
        "temperature": Refusal("a temperature that falls with every call", (False,)),
    },
)


def fusion_sections(
    job: Job,
    names: Names,
    setup: Setup,
    config: Mapping[str, object],
    found: Mapping[str, tuple[SiteSpec, list[Placed]]],
) -> list[Section]:
    """Every place's bottlenecks, side by side.

    Raises:
        AdapterRejectedError: ``unsupported_feature``, ``bad_config``.
    """
    check_values(config, TABLE.refused, TABLE.own)
    methods = [_only_bottleneck(member.methods) for member in setup.members]
    last = methods[-1]
    (way,) = stream_ways([last])
    if way.parallel:
        raise _refused("the last adapter of a fusion is parallel, which adds the stream twice")
    if boolean(config, "query_before_ln") and not way.of_output:
        raise _refused(
            "with query_before_ln the query is not what the bottlenecks read", "query_before_ln"
        )
    sections = []
    for field, (module, _) in RESIDUAL_PLACES.items():
        if not all(boolean(method.config, field) for method in methods):
            continue
        for layer in names.layers:
            place = names.tensor(f"{layer}.{module}.adapter_fusion_layer.{setup.fusion_name}")
            site, placed = found.get(f"{layer}.{module}", (None, []))
            hidden = _hidden(job)
            shapes = _shapes(config, place, hidden)
            if site is None:  # every member leaves the layer out; its fusion is saved all the same
                sections.append(Section(shapes, lambda _: None))
                continue
            shapes |= {name: shape for item in placed for name, shape in item.shapes.items()}
            build = partial(_build, job, config, site, placed, place, way)
            sections.append(Section(shapes, build))
    for site, placed in found.values():
        if len(placed) != len(methods):
            raise _refused(f"{site.name}: not every adapter of the fusion is there")
    return sections


def _only_bottleneck(methods: Sequence[Method]) -> Method:
    if len(methods) != 1 or methods[0].architecture is not None:
        raise _refused(f"{methods[0].adapter} is not one bottleneck; a fusion is of these alone")
    return methods[0]


def _hidden(job: Job) -> int:
    return next(s.out_features for s in job.base.sites.values() if s.kind is SiteKind.RESIDUAL)


def _shapes(config: Mapping[str, object], place: str, hidden: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for matrix in ("query", "key"):
        shapes[f"{place}.{matrix}.weight"] = (hidden, hidden)
        shapes[f"{place}.{matrix}.bias"] = (hidden,)
    if boolean(config, "value"):
        shapes[f"{place}.value.weight"] = (hidden, hidden)
    return shapes


def _build(
    job: Job,
    config: Mapping[str, object],
    site: SiteSpec,
    placed: Sequence[Placed],
    place: str,
    way: Way,
    builder: Builder,
) -> None:
    def tensor(name: str) -> torch.Tensor:
        return job.cast(job.tensor(f"{place}.{name}"), f"{place}.{name}")

    fusion = Fusion(
        query=tensor("query.weight"),
        key=tensor("key.weight"),
        value=tensor("value.weight") if boolean(config, "value") else None,
        query_bias=tensor("query.bias"),
        key_bias=tensor("key.bias"),
    )
    parts = [item.load(job, parallel=False, of_output=way.of_output) for item in placed]
    builder.residual(site, tuple(parts), fusion)


def _refused(why: str, param: str | None = None) -> AdapterRejectedError:
    return AdapterRejectedError("unsupported_feature", f"{why}; it is not served", param=param)
