"""LoRA, rsLoRA and DoRA as PEFT 0.21.2 writes them, compiled to LowRank, OutputScale and Bias.

For a targeted module with input x, rank r and scaling s (peft/tuners/lora/layer.py,
Linear.forward): y = base(x) + s * (x A^T) B^T, with A: [r, in] and B: [out, r] in the file. The
part holds s B^T. A bias inside B (``lora_bias``) is scaled alike.

DoRA (peft/tuners/lora/dora.py; arXiv:2402.09353) has a magnitude m, [out], in the file: with
g = m / ||W + s B A||, the norm of each output row over the dequantized weight, its output is
g * (W x + s B A x) + b: the base's own bias b is not scaled.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from manyhats.adapters.formats.biases import bias_section
from manyhats.adapters.formats.builder import Builder
from manyhats.adapters.formats.job import PREFIX, Job, Section, Shape, assemble
from manyhats.adapters.formats.lora_config import LoraSettings, parse_settings
from manyhats.adapters.formats.plain import Product, put_products
from manyhats.adapters.formats.resized import resized_section
from manyhats.adapters.formats.saved import saved_section
from manyhats.adapters.formats.targets import LINEAR_KINDS, PatternTable, matched_sites
from manyhats.adapters.formats.tokens import trained_tokens_section
from manyhats.adapters.parts import CompiledAdapter, SiteKind, SiteSpec
from manyhats.errors import AdapterRejectedError

_KINDS = LINEAR_KINDS | {SiteKind.EMBEDDING}


def compile_lora(job: Job) -> CompiledAdapter:
    """Compile a LoRA adapter; see ``compile_adapter``."""
    settings = parse_settings(job.config, job.limits)
    targets = matched_sites(settings.selection, job.base, job.matcher, kinds=_KINDS)
    _check_embeddings(settings, targets, job)
    sections = [
        _low_rank_section(job, settings, targets),
        bias_section(job, settings.bias, targets),
        saved_section(job, settings.modules_to_save, targets, tie=settings.ensure_weight_tying),
        trained_tokens_section(job, targets),
        resized_section(job, targets),
    ]
    return assemble(job, settings.family, sections)


@dataclass(frozen=True, slots=True)
class _Target:
    """A targeted site: the names of its tensors, its rank and its scaling."""

    site: SiteSpec
    a: str
    b: str
    magnitude: str | None
    inner_bias: str | None
    rank: int
    scaling: float

    @property
    def shapes(self) -> dict[str, Shape]:
        """What must be in the file."""
        site = self.site
        shapes: dict[str, Shape] = {
            self.a: (self.rank, site.in_features),
            self.b: (site.out_features, self.rank),
        }
        for name in (self.magnitude, self.inner_bias):
            if name is not None:
                shapes[name] = (site.out_features,)
        return shapes


def _low_rank_section(job: Job, settings: LoraSettings, sites: list[SiteSpec]) -> Section:
    ranks = PatternTable(settings.rank_pattern, "rank_pattern", job.matcher)
    alphas = PatternTable(settings.alpha_pattern, "alpha_pattern", job.matcher)
    targets = []
    for site in sites:
        rank = ranks.get(site.name, settings.r)
        alpha = alphas.get(site.name, settings.lora_alpha)
        place = f"{PREFIX}{site.name}"
        embedding = site.kind is SiteKind.EMBEDDING
        targets.append(
            _Target(
                site=site,
                a=f"{place}.lora_embedding_A" if embedding else f"{place}.lora_A.weight",
                b=f"{place}.lora_embedding_B" if embedding else f"{place}.lora_B.weight",
                magnitude=f"{place}.lora_magnitude_vector" if settings.use_dora else None,
                inner_bias=f"{place}.lora_B.bias" if settings.lora_bias else None,
                rank=rank,
                scaling=settings.scaling(rank, alpha),
            )
        )
    shapes = {name: shape for target in targets for name, shape in target.shapes.items()}
    return Section(shapes, partial(_build, job, targets))


def _build(job: Job, targets: list[_Target], builder: Builder) -> None:
    put_products(
        job, builder, [Product(t.site, t.a, t.b, t.scaling * t.site.scale) for t in targets]
    )
    for target in targets:
        if target.magnitude is not None:
            _magnitude(job, target, target.magnitude, builder)
        if target.inner_bias is not None:
            inner = job.tensor(target.inner_bias) * target.scaling
            builder.bias(target.site, inner, target.inner_bias)


def _magnitude(job: Job, target: _Target, name: str, builder: Builder) -> None:
    site = target.site

    def norm() -> dict[str, torch.Tensor]:
        a = job.tensor(target.a)
        b = job.tensor(target.b).t() * target.scaling
        weight = job.base_weight(site)
        return {"norm": torch.linalg.norm(torch.addmm(weight, b.t(), a), dim=1)}

    scale = job.tensor(name) / job.derived.get(f"dora.{site.name}", norm)["norm"]
    builder.scale_output(site, scale, name)
    if site.bias is not None:
        builder.bias(site, (1 - scale) * site.bias, name)


def _check_embeddings(settings: LoraSettings, targets: list[SiteSpec], job: Job) -> None:
    for site in targets:
        if site.kind is not SiteKind.EMBEDDING:
            continue
        if settings.use_dora or settings.lora_bias:
            what = "DoRA" if settings.use_dora else "lora_bias"
            raise AdapterRejectedError(
                "unsupported_site",
                f"target_modules names {site.name}, an embedding; {what} is not served there",
                param="target_modules",
            )
        tied = any(head.tied_to == site.name for head in job.base.sites.values())
        if settings.ensure_weight_tying and tied:
            raise AdapterRejectedError(
                "unsupported_feature",
                "ensure_weight_tying of a tied embedding is not served by this version",
                param="ensure_weight_tying",
            )
