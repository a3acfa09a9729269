"""LoRA and rsLoRA as PEFT 0.21.2 writes them, compiled to LowRank and Bias parts.

For a targeted module with input x, rank r and scaling s (peft/tuners/lora/layer.py,
Linear.forward): y = base(x) + s * (x A^T) B^T, with A: [r, in] and B: [out, r] in the file. The
part holds s B^T.
Trained biases are in the file as whole values (peft/tuners/tuners_utils.py,
_get_learnable_bias_state_dict): under ``<module>.base_layer.bias`` where the module is targeted,
``<module>.bias`` elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import torch

from manyhats.adapters.files import AdapterLimits, WeightsFile, all_finite
from manyhats.adapters.formats.lora_config import LoraSettings, parse_settings
from manyhats.adapters.formats.patterns import Matcher
from manyhats.adapters.formats.targets import PatternTable, matched_sites
from manyhats.adapters.parts import (
    BaseSpec,
    CompiledAdapter,
    LowRank,
    SiteKind,
    SiteParts,
    SiteSpec,
)
from manyhats.adapters.strict_json import listed, shown
from manyhats.errors import AdapterRejectedError
from manyhats.types import Digest

_PREFIX: Final = "base_model.model."
_BIAS_KINDS: Final = (SiteKind.LINEAR, SiteKind.NORM)


def compile_lora(
    config: Mapping[str, object],
    weights: WeightsFile,
    base: BaseSpec,
    limits: AdapterLimits,
    *,
    digest: Digest,
    dtype: torch.dtype,
) -> CompiledAdapter:
    """Compile a LoRA adapter; see ``compile_adapter`` for the arguments and what it raises."""
    settings = parse_settings(config, limits)
    matcher = Matcher()
    targets = matched_sites(settings, base, matcher)
    job = _Job(
        settings=settings,
        ranks=PatternTable(settings.rank_pattern, "rank_pattern", matcher),
        alphas=PatternTable(settings.alpha_pattern, "alpha_pattern", matcher),
        weights=weights,
        dtype=dtype,
        origin=_trained_on(config),
    )
    bias_names = _bias_names(settings, targets, base)
    _check_names(job, targets, bias_names, base)

    low_rank = {site.name: _low_rank(job, site) for site in targets}
    bias = {site.name: _bias_delta(job, site, name) for name, site in bias_names.items()}
    sites = {}
    for name in base.sites:
        part, delta = low_rank.get(name), bias.get(name)
        if part is not None or delta is not None:
            sites[name] = SiteParts(low_rank=part, bias=delta)
    family = "rslora" if settings.use_rslora else "lora"
    metadata = _metadata(config, low_rank)
    return CompiledAdapter(digest=digest, family=family, sites=sites, metadata=metadata)


@dataclass(frozen=True, slots=True)
class _Job:
    """What every step of one compilation needs; ``origin`` names the base it was trained on."""

    settings: LoraSettings
    ranks: PatternTable[int]
    alphas: PatternTable[float]
    weights: WeightsFile
    dtype: torch.dtype
    origin: str

    def load(self, name: str, shape: tuple[int, ...], site: SiteSpec) -> torch.Tensor:
        """The tensor in fp32 or narrower, its shape checked against what the site needs."""
        found = self.weights.tensors[name].shape
        if found != shape:
            raise AdapterRejectedError(
                "shape_mismatch",
                f"{name} has shape {list(found)}; this base's {site.name} and the configured rank "
                f"need {list(shape)}{self.hint}",
            )
        return self.weights.load(name)

    def cast(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """A contiguous copy in the wanted dtype; refused where a value does not fit it."""
        # contiguous_format, or the copy would keep a transposed layout
        cast = tensor.to(self.dtype, copy=True, memory_format=torch.contiguous_format)
        if not all_finite(cast):
            dtype = str(self.dtype).removeprefix("torch.")
            raise AdapterRejectedError("non_finite", f"{name}, once scaled, does not fit {dtype}")
        return cast

    @property
    def hint(self) -> str:
        """For refusals that another base would explain."""
        return f" (is it an adapter for another base? It names {self.origin})"


def _low_rank(job: _Job, site: SiteSpec) -> LowRank:
    """One site's part; the scaling goes into B in fp32, before the one rounding to ``dtype``."""
    rank = job.ranks.get(site.name, job.settings.r)
    alpha = job.alphas.get(site.name, job.settings.lora_alpha)
    name_a, name_b = _lora_names(site)
    a = job.load(name_a, (rank, site.in_features), site)
    b = job.load(name_b, (site.out_features, rank), site)
    scaled = b.to(torch.float32) * job.settings.scaling(rank, alpha)
    return LowRank(a=job.cast(a, name_a), b=job.cast(scaled.t(), name_b))


def _bias_names(
    settings: LoraSettings, targets: Iterable[SiteSpec], base: BaseSpec
) -> dict[str, SiteSpec]:
    """The trained biases that must be in the file, by tensor name."""
    if settings.bias == "none":
        return {}
    targeted = {site.name for site in targets}
    names = {}
    for site in base.sites.values():
        if site.bias is None or (settings.bias == "lora_only" and site.name not in targeted):
            continue
        inner = ".base_layer" if site.name in targeted else ""
        names[f"{_PREFIX}{site.name}{inner}.bias"] = site
    return names


def _bias_delta(job: _Job, site: SiteSpec, name: str) -> torch.Tensor | None:
    """Trained minus base, or None where they are equal (a bias that training left alone)."""
    if site.bias is None:
        raise AdapterRejectedError("unused_tensors", f"{name}: the base's {site.name} has no bias")
    trained = job.load(name, tuple(site.bias.shape), site)
    delta = trained.to(torch.float32) - site.bias
    if not bool(delta.any()):
        return None
    if site.kind not in _BIAS_KINDS:
        raise AdapterRejectedError(
            "unsupported_site",
            f"{name}: a trained bias of the {site.kind.value} is not served by this version",
        )
    return job.cast(delta, name)


def _check_names(
    job: _Job, targets: Iterable[SiteSpec], bias_names: Mapping[str, SiteSpec], base: BaseSpec
) -> None:
    """The file holds every tensor that the configuration calls for on this base, and no other."""
    present = job.weights.tensors.keys()
    expected = {name for site in targets for name in _lora_names(site)} | bias_names.keys()
    missing = sorted(expected - present)
    unused = sorted(present - expected)
    if unused:
        also = f"; missing: {listed(missing)}" if missing else ""
        raise AdapterRejectedError(
            "unused_tensors",
            f"{len(unused)} tensors belong to no module targeted on this base: "
            f"{listed(unused)}{also}{_no_bias_hint(unused, base)}{job.hint}",
        )
    if missing:
        raise AdapterRejectedError(
            "missing_tensors",
            f"{len(missing)} tensors are not in the file: {listed(missing)}{job.hint}",
        )


def _no_bias_hint(unused: Iterable[str], base: BaseSpec) -> str:
    for name in unused:
        module = name.removeprefix(_PREFIX).removesuffix(".bias").removesuffix(".base_layer")
        site = base.sites.get(module)
        if name.endswith(".bias") and site is not None and site.bias is None:
            return f"; the base's {module} has no bias"
    return ""


def _lora_names(site: SiteSpec) -> tuple[str, str]:
    return f"{_PREFIX}{site.name}.lora_A.weight", f"{_PREFIX}{site.name}.lora_B.weight"


def _trained_on(config: Mapping[str, object]) -> str:
    origin = config.get("base_model_name_or_path")
    return shown(origin) if isinstance(origin, str) and origin else "a base that it does not name"


def _metadata(config: Mapping[str, object], parts: Mapping[str, LowRank]) -> dict[str, str]:
    """What a listing of adapters shows; nothing is decided by it."""
    ranks = sorted({part.rank for part in parts.values()})
    metadata = {"rank": str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"}
    for field in ("base_model_name_or_path", "peft_version"):
        value = config.get(field)
        if isinstance(value, str) and value:
            metadata[field] = value[:256]
    return metadata
