"""Trained biases alone: BitFit (arXiv:2106.10199) as a plain file, and PEFT's BEFT.

A BitFit file holds the *differences* to the base's biases, one tensor ``<module>.bias`` a module,
[out] each; a module without a bias of its own may have one too. BEFT (peft/tuners/beft) adds a
trained vector, [1, out], to a linear layer's output.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from manyhats.adapters.formats.builder import Builder
from manyhats.adapters.formats.fields import check_fields, field_table, name_list
from manyhats.adapters.formats.job import PREFIX, Job, Section, Shape, assemble
from manyhats.adapters.formats.resized import resized_section
from manyhats.adapters.formats.saved import saved_section
from manyhats.adapters.formats.targets import matched_sites, selection
from manyhats.adapters.parts import CompiledAdapter, SiteKind, SiteSpec
from manyhats.adapters.strict_json import listed
from manyhats.errors import AdapterRejectedError

BITFIT_TABLE: Final = field_table((), {})
BEFT_TABLE: Final = field_table(
    {"target_modules", "modules_to_save"}, {"init_weights": "how training began"}
)
_KINDS: Final = frozenset({SiteKind.LINEAR, SiteKind.HEAD, SiteKind.NORM})


def compile_bitfit(job: Job) -> CompiledAdapter:
    """Compile a file of bias differences; see ``compile_adapter``."""
    check_fields(job.config, BITFIT_TABLE)
    biased, unknown = {}, []
    for name in job.weights.tensors:
        module = name.removeprefix(PREFIX).removesuffix(".bias")
        site = job.base.sites.get(module)
        if site is not None and name.endswith(".bias") and site.kind in _KINDS:
            biased[name] = site
        else:
            unknown.append(name)
    if not biased and not unknown:
        raise AdapterRejectedError("missing_tensors", "the file holds no bias at all")
    if unknown:
        raise AdapterRejectedError(
            "unused_tensors",
            f"{len(unknown)} tensors are no bias of a linear layer or a normalization of this "
            f"base: {listed(unknown)}{job.hint}",
        )
    return assemble(job, "bitfit", [_section(job, biased, one_row=False)])


def compile_beft(job: Job) -> CompiledAdapter:
    """Compile PEFT's BEFT; see ``compile_adapter``."""
    check_fields(job.config, BEFT_TABLE)
    targets = matched_sites(
        selection(job.config), job.base, job.matcher, transposed=False, family="BEFT"
    )
    biased = {f"{PREFIX}{site.name}.beft_bias": site for site in targets}
    sections = [
        _section(job, biased, one_row=True),
        saved_section(job, name_list(job.config, "modules_to_save"), targets),
        resized_section(job, targets),
    ]
    return assemble(job, "beft", sections)


def _section(job: Job, biased: dict[str, SiteSpec], *, one_row: bool) -> Section:
    shapes: dict[str, Shape] = {
        name: (1, site.out_features) if one_row else (site.out_features,)
        for name, site in biased.items()
    }
    return Section(shapes, partial(_build, job, biased))


def _build(job: Job, biased: dict[str, SiteSpec], builder: Builder) -> None:
    for name, site in biased.items():
        builder.bias(site, job.tensor(name).flatten(), name)
