"""AdaLoRA as PEFT 0.21.2 writes it (peft/tuners/adalora/layer.py; arXiv:2303.10512).

y = base(x) + x (A * E)^T B^T * alpha / (r + 1e-5), with A: [r, in], E: [r, 1], B: [out, r] in the
file. ``rank_pattern`` has for each module which of the ``init_r`` ranks were kept; the file holds
those alone. ``r`` in the scaling stays ``init_r`` whatever was pruned.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Final

import torch

from manyhats.adapters.formats.biases import bias_section
from manyhats.adapters.formats.builder import Builder
from manyhats.adapters.formats.fields import (
    Refusal,
    bad,
    boolean,
    check_fields,
    field_table,
    name_list,
    number,
    rank,
    table,
    text,
)
from manyhats.adapters.formats.job import PREFIX, Job, Section, Shape, assemble
from manyhats.adapters.formats.lora_config import HONOURED, IRRELEVANT, REFUSED
from manyhats.adapters.formats.resized import resized_section
from manyhats.adapters.formats.saved import saved_section
from manyhats.adapters.formats.targets import matched_sites, selection
from manyhats.adapters.parts import CompiledAdapter, SiteSpec

_EPSILON: Final = 1e-5
_LEAVES: Final = ("lora_A", "lora_E", "lora_B")
_NOT_TAKEN: Final = {
    "use_dora": Refusal("DoRA beside AdaLoRA", (False,)),
    "use_rslora": Refusal("rsLoRA beside AdaLoRA", (False,)),
    "lora_bias": Refusal("a bias inside lora_B", (False,)),
    "alpha_pattern": Refusal("alpha_pattern beside AdaLoRA", ({},)),
    "trainable_token_indices": Refusal("trained tokens beside AdaLoRA"),
}

TABLE: Final = field_table(
    (HONOURED | {"init_r"}) - _NOT_TAKEN.keys() - {"r", "init_lora_weights", "ensure_weight_tying"},
    {
        **IRRELEVANT,
        "r": "AdaLoRA trains with init_r",
        "target_r": "where training was to end",
        "init_lora_weights": "how training began",
        "ensure_weight_tying": "concerns embeddings, which AdaLoRA does not take",
        **dict.fromkeys(
            ("tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
            "training's schedule",
        ),
    },
    {**REFUSED, **_NOT_TAKEN},
)


def compile_adalora(job: Job) -> CompiledAdapter:
    """Compile an AdaLoRA adapter; see ``compile_adapter``."""
    config = job.config
    check_fields(config, TABLE)
    boolean(config, "fan_in_fan_out")
    init_r = rank("init_r", config.get("init_r", 12), job.limits)
    alpha = number("lora_alpha", config.get("lora_alpha", 8))
    targets = matched_sites(selection(config), job.base, job.matcher, family="AdaLoRA")
    kept = _kept(config, targets, init_r)
    shapes: dict[str, Shape] = {}
    scalings = []
    for site in targets:
        names, r = _names(site), kept[site.name]
        # PEFT's default where alpha is not positive: the rank that is left
        scalings.append((site, (alpha if alpha > 0 else float(r)) / (init_r + _EPSILON)))
        shapes |= dict(
            zip(names, ((r, site.in_features), (r, 1), (site.out_features, r)), strict=True)
        )
    sections = [
        Section(shapes, partial(_build, job, scalings)),
        bias_section(job, text(config, "bias", "none", ("none", "all", "lora_only")), targets),
        saved_section(job, name_list(config, "modules_to_save"), targets),
        resized_section(job, targets),
    ]
    return assemble(job, "adalora", sections)


def _kept(config: Mapping[str, object], targets: list[SiteSpec], init_r: int) -> dict[str, int]:
    """How many ranks each target has left."""
    kept = dict.fromkeys((site.name for site in targets), init_r)
    for key, mask in table(config, "rank_pattern"):
        module = key.removesuffix(".default").removesuffix(".lora_E").removeprefix(PREFIX)
        if (
            module not in kept
            or not isinstance(mask, list)
            or len(mask) != init_r
            or not all(isinstance(item, bool) for item in mask)
        ):
            raise bad(
                "rank_pattern",
                {key: mask},
                f"for the lora_E of a targeted module {init_r} (init_r) times true or false",
            )
        kept[module] = sum(mask)
    return kept


def _build(job: Job, scalings: list[tuple[SiteSpec, float]], builder: Builder) -> None:
    for site, scaling in scalings:
        name_a, name_e, name_b = _names(site)
        values = job.tensor(name_e).flatten()
        # a singular value of zero is a pruned rank that the file still holds
        left = torch.nonzero(values).flatten()
        a = job.tensor(name_a)[left]
        b = job.tensor(name_b).t()[left] * (values[left, None] * scaling)
        builder.low_rank(site, a, b, name_a, name_b)


def _names(site: SiteSpec) -> tuple[str, ...]:
    return tuple(f"{PREFIX}{site.name}.{leaf}" for leaf in _LEAVES)
