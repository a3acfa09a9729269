"""(IA)^3 as PEFT 0.21.2 writes it (peft/tuners/ia3/layer.py; arXiv:2205.05638).

A feedforward module's input is scaled, any other module's whole output, the base's bias with it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from manyhats.adapters.formats.builder import Builder
from manyhats.adapters.formats.fields import (
    bad,
    boolean,
    check_fields,
    field_table,
    name_list,
    names,
)
from manyhats.adapters.formats.job import PREFIX, Job, Section, Shape, assemble
from manyhats.adapters.formats.resized import resized_section
from manyhats.adapters.formats.saved import saved_section
from manyhats.adapters.formats.targets import matched_sites, selection
from manyhats.adapters.parts import CompiledAdapter, SiteSpec

TABLE: Final = field_table(
    {
        "target_modules",
        "exclude_modules",
        "feedforward_modules",
        "fan_in_fan_out",
        "modules_to_save",
    },
    {"init_ia3_weights": "how training began"},
)


def compile_ia3(job: Job) -> CompiledAdapter:
    """Compile an IA3 adapter; see ``compile_adapter``."""
    check_fields(job.config, TABLE)
    boolean(job.config, "fan_in_fan_out")  # matters to merging alone
    targets = matched_sites(selection(job.config), job.base, job.matcher, family="IA3")
    feedforward = _feedforward_test(job)
    scaled = [(site, feedforward(site.name)) for site in targets]
    shapes: dict[str, Shape] = {
        _name(site): (1, site.in_features) if first else (site.out_features, 1)
        for site, first in scaled
    }
    sections = [
        Section(shapes, partial(_build, job, scaled)),
        saved_section(job, name_list(job.config, "modules_to_save"), targets),
        resized_section(job, targets),
    ]
    return assemble(job, "ia3", sections)


def _feedforward_test(job: Job) -> Callable[[str], bool]:
    """PEFT's rule: a pattern for the whole name, or names that a module's name ends with."""
    field = "feedforward_modules"
    if job.config.get(field) is None:
        raise bad(field, None, "a list of module names or a pattern")
    found = names(job.config, field)
    if isinstance(found, str):
        return job.matcher.compile(found, field).fullmatch
    endings = tuple(found)
    return lambda name: name.endswith(endings)


def _build(job: Job, scaled: list[tuple[SiteSpec, bool]], builder: Builder) -> None:
    for site, first in scaled:
        name = _name(site)
        scale = job.tensor(name).flatten()
        if first:
            builder.scale_input(site, scale, name)
        else:
            builder.scale_output(site, scale, name)


def _name(site: SiteSpec) -> str:
    return f"{PREFIX}{site.name}.ia3_l"
