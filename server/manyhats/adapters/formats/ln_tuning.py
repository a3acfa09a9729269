"""LN-tuning as PEFT 0.21.2 writes it (peft/tuners/ln_tuning; arXiv:2312.11420): trained copies of
normalizations, which stand in for the base's own.
"""

from __future__ import annotations

from typing import Final

from manyhats.adapters.formats.fields import check_fields, field_table, name_list
from manyhats.adapters.formats.job import PREFIX, Job, assemble
from manyhats.adapters.formats.resized import resized_section
from manyhats.adapters.formats.saved import replaced_section, saved_section
from manyhats.adapters.formats.targets import LINEAR_KINDS, matched_sites, selection
from manyhats.adapters.parts import CompiledAdapter, SiteKind

TABLE: Final = field_table({"target_modules", "exclude_modules", "modules_to_save"}, {})
_KINDS: Final = LINEAR_KINDS | {SiteKind.NORM, SiteKind.EMBEDDING}


def compile_ln_tuning(job: Job) -> CompiledAdapter:
    """Compile an LN-tuning adapter; see ``compile_adapter``."""
    check_fields(job.config, TABLE)
    targets = matched_sites(
        selection(job.config), job.base, job.matcher, kinds=_KINDS, family="LN-tuning"
    )
    copies = {site.name: (site, f"{PREFIX}{site.name}.ln_tuning_layers") for site in targets}
    sections = [
        replaced_section(job, copies),
        saved_section(job, name_list(job.config, "modules_to_save"), targets),
        resized_section(job, targets),
    ]
    return assemble(job, "ln_tuning", sections)
