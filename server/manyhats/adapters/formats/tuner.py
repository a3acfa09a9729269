"""What the tuners of linear layers have in common: targets, biases, modules saved whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from manyhats.adapters.formats.biases import bias_section
from manyhats.adapters.formats.fields import (
    FieldTable,
    Refusal,
    check_fields,
    field_table,
    name_list,
    text,
)
from manyhats.adapters.formats.job import Job, Section, assemble
from manyhats.adapters.formats.resized import resized_section
from manyhats.adapters.formats.saved import saved_section
from manyhats.adapters.formats.targets import matched_sites, selection
from manyhats.adapters.parts import CompiledAdapter, SiteSpec

_SELECTING: Final = frozenset(
    {
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
    }
)


@dataclass(frozen=True, slots=True)
class Tuner:
    """A family that changes linear layers.

    ``plan`` lists its tensors for the targets; ``transposed`` whether it takes GPT-2's Conv1D;
    ``own_bias`` the value of ``bias`` beside ``none`` and ``all``, None where there is no such
    field.
    """

    name: str
    table: FieldTable
    plan: Callable[[Job, list[SiteSpec]], Section]
    transposed: bool
    own_bias: str | None = None


def tuner_table(
    honoured: frozenset[str],
    irrelevant: Mapping[str, str],
    refused: Mapping[str, Refusal] | None = None,
    *,
    without: frozenset[str] = frozenset(),
) -> FieldTable:
    """A family's fields beside those that select modules, of which it may be ``without`` some."""
    return field_table((_SELECTING - without) | honoured, irrelevant, refused)


def compile_tuner(job: Job, *, tuner: Tuner) -> CompiledAdapter:
    """Compile an adapter of such a family; see ``compile_adapter``."""
    check_fields(job.config, tuner.table)
    targets = matched_sites(
        selection(job.config),
        job.base,
        job.matcher,
        transposed=tuner.transposed,
        family=tuner.name,
    )
    mode = "none"
    if tuner.own_bias is not None:
        mode = text(job.config, "bias", "none", ("none", "all", tuner.own_bias))
    sections = [
        tuner.plan(job, targets),
        bias_section(job, mode, targets),
        saved_section(job, name_list(job.config, "modules_to_save"), targets),
        resized_section(job, targets),
    ]
    return assemble(job, tuner.name.lower(), sections)
