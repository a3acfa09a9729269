"""Importers: one per family of adapters, or a refusal by name with the reason.

Families are named as PEFT's ``peft_type`` names them; every one of PEFT 0.21.2 is in one of the two
tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

import torch

from manyhats.adapters.files import AdapterLimits, WeightsFile
from manyhats.adapters.formats.lora import compile_lora
from manyhats.adapters.parts import BaseSpec, CompiledAdapter
from manyhats.adapters.strict_json import shown
from manyhats.errors import AdapterRejectedError
from manyhats.types import Digest


class Importer(Protocol):
    """Compiles one family; the contract is ``compile_adapter``'s."""

    def __call__(
        self,
        config: Mapping[str, object],
        weights: WeightsFile,
        base: BaseSpec,
        limits: AdapterLimits,
        *,
        digest: Digest,
        dtype: torch.dtype,
    ) -> CompiledAdapter:
        """Compile, or raise AdapterRejectedError."""


IMPORTERS: Final[Mapping[str, Importer]] = {"LORA": compile_lora}
"""The families that are served."""

_PROMPT: Final = "it adds trained prompt embeddings, not a low-rank product"
_CACHE: Final = "it adds trained keys and values, not a low-rank product"
_SCALES: Final = "it scales activations, a part that is not there yet"
_TURNS: Final = "it transforms the base's weights by multiplication"
_SPARSE: Final = "it changes single entries of the base's weights"
_SPECTRAL: Final = "it changes the base's weights in a transformed domain"
_SHARED: Final = "it builds its product from vectors or matrices shared between modules"
_PRODUCT: Final = "its product has another form than B A"
_ROUTES: Final = "it chooses between several adapters for each input"
_NETWORK: Final = "it adds a network of its own beside the base's modules"
_DECOMPOSES: Final = "it rewrites a decomposition of the base's weights"

REFUSED_FAMILIES: Final[Mapping[str, str]] = {
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "CPT": _PROMPT,
    "PREFIX_TUNING": _CACHE,
    "CARTRIDGE": _CACHE,
    "ADAPTION_PROMPT": _CACHE,
    "ADALORA": "its singular values and pruned ranks are not folded in yet",
    "LN_TUNING": "it replaces normalization weights, a part that is not there yet",
    "TRAINABLE_TOKENS": "it replaces rows of the embedding, a part that is not there yet",
    "IA3": _SCALES,
    "BEFT": "it trains biases under names of its own",
    "LOHA": _PRODUCT,
    "LOKR": _PRODUCT,
    "HIRA": _PRODUCT,
    "GLORA": _PRODUCT,
    "GRALORA": _PRODUCT,
    "DELORA": _PRODUCT,
    "MISS": _PRODUCT,
    "C3A": _PRODUCT,
    "VERA": _SHARED,
    "PVERA": _SHARED,
    "VBLORA": _SHARED,
    "UNILORA": _SHARED,
    "RANDLORA": _SHARED,
    "TINYLORA": _SHARED,
    "LILY": _SHARED,
    "FROD": _SHARED,
    "BOFT": _TURNS,
    "OFT": _TURNS,
    "HRA": _TURNS,
    "ROAD": _TURNS,
    "PSOFT": _TURNS,
    "DEFT": _TURNS,
    "SHIRA": _SPARSE,
    "SUPERTUNING": _SPARSE,
    "FOURIERFT": _SPECTRAL,
    "WAVEFT": _SPECTRAL,
    "OSF": _DECOMPOSES,
    "ADAMSS": _DECOMPOSES,
    "POLY": _ROUTES,
    "XLORA": _ROUTES,
    "PEANUT": _NETWORK,
    "SHADOW": _NETWORK,
}
"""The families that are known and not served, each with why."""


def compile_adapter(
    config: Mapping[str, object],
    weights: WeightsFile,
    base: BaseSpec,
    limits: AdapterLimits,
    *,
    digest: Digest,
    dtype: torch.dtype,
) -> CompiledAdapter:
    """Compile an adapter of any family to parts, or refuse it with the reason.

    Args:
        config: adapter_config.json as ``read_config`` returned it.
        weights: The checked weights. The result shares no memory with them.
        base: The base model that it is to be served on.
        limits: Bounds.
        digest: The version's digest, taken over unchanged.
        dtype: Of the parts: float32, float16 or bfloat16.

    Raises:
        AdapterRejectedError: ``unsupported_family``, ``unsupported_feature``, ``unsupported_site``,
            ``bad_config``, ``no_module_matched``, ``unused_tensors``, ``missing_tensors``,
            ``shape_mismatch``, ``rank_too_large``, ``non_finite``.
    """
    family = config.get("peft_type")
    if not isinstance(family, str):
        raise AdapterRejectedError(
            "bad_config", f"peft_type is {shown(family)}; it must name a family", param="peft_type"
        )
    importer = IMPORTERS.get(family)
    if importer is None:
        raise _refusal(family)
    return importer(config, weights, base, limits, digest=digest, dtype=dtype)


def _refusal(family: str) -> AdapterRejectedError:
    why = REFUSED_FAMILIES.get(family)
    if why is None:
        message = f"{shown(family)} is no family of adapters that is known here"
    else:
        message = f"{family} adapters are not served by this version: {why}"
    return AdapterRejectedError("unsupported_family", message, param="peft_type")
