"""Trained biases that PEFT saves beside a tuner's own tensors (``bias="all"``, ``"..._only"``).

They are in the file as whole values (peft/tuners/tuners_utils.py, _get_learnable_bias_state_dict):
under ``<module>.base_layer.bias`` where the module is targeted, ``<module>.bias`` elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from manyhats.adapters.formats.builder import Builder
from manyhats.adapters.formats.job import PREFIX, Job, Section
from manyhats.adapters.parts import SiteSpec


def bias_section(job: Job, mode: str, targets: Iterable[SiteSpec]) -> Section:
    """The biases that ``mode`` (``none``, ``all`` or the targets' only) calls for.

    A part is trained minus base: a bias that training left alone is none.
    """
    if mode == "none":
        return Section({}, lambda builder: None)
    targeted = {site.name for site in targets}
    wanted = {}
    for site in job.base.sites.values():
        if site.bias is None or (mode != "all" and site.name not in targeted):
            continue
        inner = ".base_layer" if site.name in targeted else ""
        wanted[f"{PREFIX}{site.name}{inner}.bias"] = site
    shapes = {name: (site.out_features,) for name, site in wanted.items()}
    return Section(shapes, partial(_build, job, wanted))


def _build(job: Job, wanted: dict[str, SiteSpec], builder: Builder) -> None:
    for name, site in wanted.items():
        if site.bias is not None:
            builder.bias(site, job.tensor(name) - site.bias, name)
