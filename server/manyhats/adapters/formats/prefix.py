"""Prefix tuning and cartridges as PEFT 0.21.2 writes them (arXiv:2101.00190).

``prompt_embeddings`` is [tokens, 2 * layers * heads * head dim], for each layer a key and a value,
as they go into the cache (peft/peft_model.py, get_prompt); a projection (``prefix_projection``) is
evaluated when PEFT saves. No rotation is applied to the keys.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from manyhats.adapters.formats.builder import Builder
from manyhats.adapters.formats.fields import check_fields, field_table
from manyhats.adapters.formats.job import Job, Section, Shape, assemble
from manyhats.adapters.formats.prompts import (
    EMBEDDINGS,
    PROMPT_HONOURED,
    PROMPT_IRRELEVANT,
    PROMPT_REFUSED,
    virtual_tokens,
)
from manyhats.adapters.parts import CompiledAdapter, SiteKind, SiteSpec
from manyhats.errors import AdapterRejectedError

TABLE: Final = field_table(
    PROMPT_HONOURED,
    {
        **PROMPT_IRRELEVANT,
        "num_attention_heads": "the tensor's own shape decides",
        "num_layers": "the tensor's own shape decides",
        "prefix_projection": "PEFT evaluates the projection when it saves",
        "encoder_hidden_size": "of the projection",
        "init_weights": "how training began",
        "num_frozen_tokens": "of a cartridge: which of its tokens were trained",
    },
    PROMPT_REFUSED,
)


def compile_prefix(job: Job) -> CompiledAdapter:
    """Compile PREFIX_TUNING or CARTRIDGE; see ``compile_adapter``."""
    check_fields(job.config, TABLE)
    tokens = virtual_tokens(job)
    sites = prefix_sites(job)
    heads, head_dim = sites[0].in_features, sites[0].out_features
    shapes: dict[str, Shape] = {EMBEDDINGS: (tokens, 2 * len(sites) * heads * head_dim)}
    section = Section(shapes, partial(_build, job, sites))
    family = "cartridge" if job.config["peft_type"] == "CARTRIDGE" else "prefix_tuning"
    return assemble(job, family, [section], virtual_tokens=tokens)


def prefix_sites(job: Job) -> list[SiteSpec]:
    """The attention of every layer, all of the same size; else ``unsupported_site``."""
    sites = [site for site in job.base.sites.values() if site.kind is SiteKind.ATTENTION]
    if len(sites) != job.base.num_layers:
        raise AdapterRejectedError(
            "unsupported_site",
            f"the base has {len(sites)} attentions in {job.base.num_layers} layers; a prefix needs "
            "one in each",
        )
    if len({(site.in_features, site.out_features) for site in sites}) != 1:
        raise AdapterRejectedError(
            "unsupported_site", "the base's layers have attentions of different sizes"
        )
    return sites


def _build(job: Job, sites: list[SiteSpec], builder: Builder) -> None:
    whole = job.tensor(EMBEDDINGS)
    heads, head_dim = sites[0].in_features, sites[0].out_features
    states = whole.view(whole.shape[0], len(sites), 2, heads, head_dim)
    for layer, site in enumerate(sites):
        builder.prefix(site, states[:, layer, 0], states[:, layer, 1], EMBEDDINGS)
