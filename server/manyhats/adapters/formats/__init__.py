"""Importers: one per family of adapters, or a refusal by name with the reason.

Families are named as PEFT's ``peft_type`` names them; every one of PEFT 0.21.2 is in one of the two
tables, and BITFIT is a name of our own. What AdapterHub's library saved has no such name and goes
to ``adapterhub``. docs/adapters.md says how each is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import torch

from manyhats.adapters.base_weights import BaseWeights
from manyhats.adapters.files import AdapterLimits
from manyhats.adapters.formats.adalora import compile_adalora
from manyhats.adapters.formats.adapterhub import compile_adapterhub, is_adapterhub
from manyhats.adapters.formats.bitfit import compile_beft, compile_bitfit
from manyhats.adapters.formats.changes import C3A, FOURIERFT, HIRA, ROAD
from manyhats.adapters.formats.ia3 import compile_ia3
from manyhats.adapters.formats.job import Derived, Job, NotKept
from manyhats.adapters.formats.ln_tuning import compile_ln_tuning
from manyhats.adapters.formats.lora import compile_lora
from manyhats.adapters.formats.lycoris import LOHA, LOKR
from manyhats.adapters.formats.prefix import compile_prefix
from manyhats.adapters.formats.products import DELORA, HRA, MISS
from manyhats.adapters.formats.prompts import compile_multitask_prompt, compile_prompt
from manyhats.adapters.formats.rotations import OFT
from manyhats.adapters.formats.tokens import compile_trainable_tokens
from manyhats.adapters.formats.tuner import compile_tuner
from manyhats.adapters.formats.vera import VERA
from manyhats.adapters.parts import BaseSpec, CompiledAdapter
from manyhats.adapters.strict_json import shown
from manyhats.adapters.weights_file import WeightsFile
from manyhats.errors import AdapterRejectedError
from manyhats.types import Digest

Importer = Callable[[Job], CompiledAdapter]
"""Compiles one family; raises what ``compile_adapter`` raises."""

IMPORTERS: Final[Mapping[str, Importer]] = {
    "LORA": compile_lora,
    "ADALORA": compile_adalora,
    "IA3": compile_ia3,
    "LN_TUNING": compile_ln_tuning,
    "BITFIT": compile_bitfit,
    "BEFT": compile_beft,
    "TRAINABLE_TOKENS": compile_trainable_tokens,
    "PROMPT_TUNING": partial(compile_prompt, family="PROMPT_TUNING"),
    "P_TUNING": partial(compile_prompt, family="P_TUNING"),
    "CPT": partial(compile_prompt, family="CPT"),
    "MULTITASK_PROMPT_TUNING": compile_multitask_prompt,
    "PREFIX_TUNING": compile_prefix,
    "CARTRIDGE": compile_prefix,
    "VERA": partial(compile_tuner, tuner=VERA),
    "LOHA": partial(compile_tuner, tuner=LOHA),
    "LOKR": partial(compile_tuner, tuner=LOKR),
    "DELORA": partial(compile_tuner, tuner=DELORA),
    "MISS": partial(compile_tuner, tuner=MISS),
    "HRA": partial(compile_tuner, tuner=HRA),
    "OFT": partial(compile_tuner, tuner=OFT),
    "HIRA": partial(compile_tuner, tuner=HIRA),
    "ROAD": partial(compile_tuner, tuner=ROAD),
    "FOURIERFT": partial(compile_tuner, tuner=FOURIERFT),
    "C3A": partial(compile_tuner, tuner=C3A),
}
"""The families that are served."""

_TURNS: Final = "it rotates the base's weights by a form that is not rebuilt here"
_SPARSE: Final = "it changes single entries of the base's weights, at places drawn while training"
_SHARED: Final = "it builds its product from vectors or matrices shared between modules"
_PRODUCT: Final = "its product has a form that is not rebuilt here"
_ROUTES: Final = "it chooses between several adapters for each input"
_NETWORK: Final = "it adds a network of its own beside the base's modules"
_DECOMPOSES: Final = "it rewrites a decomposition of the base's weights"

REFUSED_FAMILIES: Final[Mapping[str, str]] = {
    "ADAPTION_PROMPT": "it adds gated attention to a prompt of its own in each layer",
    "GLORA": _PRODUCT,
    "GRALORA": _PRODUCT,
    "PVERA": _SHARED,
    "VBLORA": _SHARED,
    "UNILORA": _SHARED,
    "RANDLORA": _SHARED,
    "TINYLORA": _SHARED,
    "LILY": _SHARED,
    "FROD": _SHARED,
    "BOFT": _TURNS,
    "PSOFT": _TURNS,
    "DEFT": _TURNS,
    "SHIRA": _SPARSE,
    "SUPERTUNING": _SPARSE,
    "WAVEFT": "it changes the base's weights in a transformed domain",
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
    base_weights: BaseWeights | None = None,
    derived: Derived | None = None,
) -> CompiledAdapter:
    """Compile an adapter of any family to parts, or refuse it with the reason.

    Args:
        config: adapter_config.json as ``read_config`` returned it.
        weights: The checked weights. The result may have views of them.
        base: The base model that it is to be served on.
        limits: Bounds.
        digest: The version's digest, taken over unchanged.
        dtype: Of the parts: float32, float16 or bfloat16.
        base_weights: For the families whose parts depend on the base's weights; without them those
            are refused.
        derived: Where what is computed from them is kept; without it, nowhere.

    Raises:
        AdapterRejectedError: ``unsupported_family``, ``unsupported_feature``, ``unsupported_site``,
            ``bad_config``, ``no_module_matched``, ``unused_tensors``, ``missing_tensors``,
            ``shape_mismatch``, ``rank_too_large``, ``too_large``, ``non_finite``.
    """
    importer = compile_adapterhub if is_adapterhub(config) else _importer(config)
    job = Job(
        config=config,
        weights=weights,
        base=base,
        limits=limits,
        digest=digest,
        dtype=dtype,
        base_weights=base_weights,
        derived=derived or NotKept(),
    )
    return importer(job)


def _importer(config: Mapping[str, object]) -> Importer:
    family = config.get("peft_type")
    if not isinstance(family, str):
        raise AdapterRejectedError(
            "bad_config", f"peft_type is {shown(family)}; it must name a family", param="peft_type"
        )
    importer = IMPORTERS.get(family)
    if importer is None:
        raise _refusal(family)
    return importer


def _refusal(family: str) -> AdapterRejectedError:
    why = REFUSED_FAMILIES.get(family)
    if why is None:
        message = f"{shown(family)} is no family of adapters that is known here"
    else:
        message = f"{family} adapters are not served by this version: {why}"
    return AdapterRejectedError("unsupported_family", message, param="peft_type")
