"""LoRA's configuration, every field of PEFT 0.21.2's LoraConfig put in one of three tables.

A field is honoured here, or cannot change what an already trained adapter computes, or is refused
unless it is neutral. A field in none of the tables is refused: a newer PEFT may have given it a
meaning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from manyhats.adapters.files import AdapterLimits
from manyhats.adapters.strict_json import shown
from manyhats.errors import AdapterRejectedError

HONOURED: Final = frozenset(
    {
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "fan_in_fan_out",
        "bias",
        "init_lora_weights",
    }
)
"""Fields that ``parse_settings`` reads and checks."""

IRRELEVANT: Final[Mapping[str, str]] = {
    "auto_mapping": "names classes for PEFT's own loading",
    "peft_version": "who wrote the file; shown, not trusted",
    "base_model_name_or_path": "shown; the tensors' shapes decide whether the base fits",
    "revision": "of the base, as base_model_name_or_path",
    "inference_mode": "says whether the weights are to be trained further",
    "lora_dropout": "acts in training only",
    "megatron_core": "a module's name, read with megatron_config only, which is refused",
    "loftq_config": "read with init_lora_weights='loftq' only, which is refused",
    "eva_config": "how A was initialised; the base is untouched",
    "corda_config": "read with init_lora_weights='corda' only, which is refused",
    "lora_ga_config": "read with init_lora_weights='lora_ga' only, which is refused",
    "qalora_group_size": "read with use_qalora only, which is refused",
    "runtime_config": "where PEFT computes, not what; PEFT ignores it in a file",
    "ensure_weight_tying": "concerns adapters of tied embeddings, which are refused",
    "merge_weights": "PEFT 0.2 and older: whether to merge for inference; the sum is the same",
}
"""Fields whose value cannot change the product at inference, and why."""


@dataclass(frozen=True, slots=True)
class _Refusal:
    """``name``: what the field turns on. ``neutral``: values that turn nothing on, beside null."""

    name: str
    neutral: tuple[object, ...] = ()


REFUSED: Final[Mapping[str, _Refusal]] = {
    "use_dora": _Refusal("DoRA", (False,)),
    "modules_to_save": _Refusal("fully trained modules (modules_to_save)", ([],)),
    "lora_bias": _Refusal("a bias inside lora_B", (False,)),
    "use_qalora": _Refusal("QALoRA", (False,)),
    "target_parameters": _Refusal("LoRA on bare parameters (target_parameters)", ([],)),
    "trainable_token_indices": _Refusal("trained token embeddings"),
    "layer_replication": _Refusal("replicated layers", ([],)),
    "arrow_config": _Refusal("Arrow routing"),
    "alora_invocation_tokens": _Refusal("activated LoRA (aLoRA)"),
    "megatron_config": _Refusal("LoRA on Megatron's parallel layers", ({},)),
    "use_bdlora": _Refusal("block-diagonal LoRA (BD-LoRA)"),
    "kasa_config": _Refusal("KaSA, which changes the base's weights"),
    "monteclora_config": _Refusal("MonteCLoRA"),
    "velora_config": _Refusal("VeLoRA"),
    "enable_lora": _Refusal("PEFT 0.2's merged projections (enable_lora)"),
}
"""Fields that change what is computed, or which tensors are there: served only where neutral."""

# These initialisations subtract from the base's weights what they put into A and B. PEFT's
# save_pretrained with path_initial_model_for_weight_conversion turns the result into plain LoRA and
# writes init_lora_weights: true; any other file is right only over the changed base, which is not
# the one served.
_CHANGES_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
_KEEPS_BASE: Final = frozenset({"gaussian", "eva", "orthogonal", "mica"})

BiasMode = Literal["none", "all", "lora_only"]
_BIAS_MODES: Final[Mapping[object, BiasMode]] = {
    "none": "none",
    "all": "all",
    "lora_only": "lora_only",
}


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The honoured fields, checked; absent ones have LoraConfig's defaults.

    ``layers_to_transform`` None: every layer.
    """

    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    target_modules: str | frozenset[str]
    exclude_modules: str | frozenset[str]
    layers_to_transform: frozenset[int] | None
    layers_pattern: tuple[str, ...]
    bias: BiasMode

    def scaling(self, rank: int, alpha: float) -> float:
        """The product's factor: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732)."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def parse_settings(config: Mapping[str, object], limits: AdapterLimits) -> LoraSettings:
    """Check a LoRA configuration and return what of it matters.

    Raises:
        AdapterRejectedError: ``bad_config`` (an unknown field, a wrong type or value),
            ``unsupported_feature`` (understood, not served), ``rank_too_large``. ``param`` is the
            field.
    """
    _check_fields(config)
    _check_task(config.get("task_type"))
    _check_init(config.get("init_lora_weights", True))
    # PEFT itself corrects a flag that does not fit the layer's type, and it matters to merging
    # alone
    _boolean(config, "fan_in_fan_out")
    bias = config.get("bias", "none")
    if not isinstance(bias, str) or bias not in _BIAS_MODES:
        raise _bad("bias", bias, "one of none, all, lora_only")
    layers, layers_pattern = _layers(config)
    settings = LoraSettings(
        r=_rank("r", config.get("r", 8), limits),
        lora_alpha=_alpha("lora_alpha", config.get("lora_alpha", 8)),
        rank_pattern={
            k: _rank("rank_pattern", v, limits) for k, v in _object(config, "rank_pattern")
        },
        alpha_pattern={k: _alpha("alpha_pattern", v) for k, v in _object(config, "alpha_pattern")},
        use_rslora=_boolean(config, "use_rslora"),
        target_modules=_names(config, "target_modules"),
        exclude_modules=_names(config, "exclude_modules"),
        layers_to_transform=layers,
        layers_pattern=layers_pattern,
        bias=_BIAS_MODES[bias],
    )
    if config.get("target_modules") is None:
        raise _bad("target_modules", None, "a list of module names, a pattern or 'all-linear'")
    if isinstance(settings.target_modules, str) and (layers is not None or layers_pattern):
        raise _bad(
            "layers_to_transform",
            config.get("layers_to_transform"),
            "absent beside a pattern in target_modules",
        )
    return settings


def _check_fields(config: Mapping[str, object]) -> None:
    for field, refusal in REFUSED.items():
        value = config.get(field)
        # `is` beside the type: 0 equals False and is not what PEFT writes
        neutral = value is None or any(
            type(value) is type(n) and value == n for n in refusal.neutral
        )
        if not neutral:
            raise AdapterRejectedError(
                "unsupported_feature",
                f"{refusal.name} is not served by this version ({field} is set)",
                param=field,
            )
    unknown = sorted(config.keys() - HONOURED - IRRELEVANT.keys() - REFUSED.keys())
    if unknown:
        raise AdapterRejectedError(
            "bad_config",
            f"the field {shown(unknown[0])} is not known here; it may change what is computed",
            param=unknown[0][:64],
        )


def _check_task(task: object) -> None:
    if task is not None and task != "CAUSAL_LM":
        raise AdapterRejectedError(
            "unsupported_feature",
            f"task_type {shown(task)} is not served; only CAUSAL_LM is",
            param="task_type",
        )


def _check_init(value: object) -> None:
    if isinstance(value, bool):
        return
    if not isinstance(value, str):
        raise _bad("init_lora_weights", value, "true, false or a name")
    if value.lower().startswith(_CHANGES_BASE):
        raise AdapterRejectedError(
            "unsupported_feature",
            f"init_lora_weights {shown(value)} changes the base's weights; save with PEFT's "
            "path_initial_model_for_weight_conversion, which converts it to plain LoRA",
            param="init_lora_weights",
        )
    if value.lower() not in _KEEPS_BASE:
        raise _bad("init_lora_weights", value, "an initialisation that is known here")


def _boolean(config: Mapping[str, object], field: str) -> bool:
    value = config.get(field, False)
    if not isinstance(value, bool):
        raise _bad(field, value, "true or false")
    return value


def _rank(field: str, value: object, limits: AdapterLimits) -> int:
    if type(value) is not int or value < 1:
        raise _bad(field, value, "a positive integer")
    if value > limits.max_rank:
        raise AdapterRejectedError(
            "rank_too_large",
            f"{field} is {shown(value)}, over the bound of {limits.max_rank}",
            param=field,
        )
    return value


def _alpha(field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _bad(field, value, "a finite number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _bad(field, value, "a finite number")
    return number


def _object(config: Mapping[str, object], field: str) -> list[tuple[str, object]]:
    value = config.get(field)
    if value is None:
        return []
    if not isinstance(value, dict):
        raise _bad(field, value, "an object from module names or patterns to numbers")
    return list(value.items())


def _names(config: Mapping[str, object], field: str) -> str | frozenset[str]:
    value = config.get(field)
    if value is None:
        return frozenset()
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _bad(field, value, "a list of module names or a pattern")
    return frozenset(value)


def _layers(config: Mapping[str, object]) -> tuple[frozenset[int] | None, tuple[str, ...]]:
    value = config.get("layers_to_transform")
    listed = [value] if type(value) is int else value
    if listed is not None and (
        not isinstance(listed, list) or not all(type(item) is int for item in listed)
    ):
        raise _bad("layers_to_transform", value, "an integer or a list of integers")
    patterns = config.get("layers_pattern")
    several = (
        [] if patterns in (None, "") else [patterns] if isinstance(patterns, str) else patterns
    )
    if not isinstance(several, list) or not all(isinstance(item, str) for item in several):
        raise _bad("layers_pattern", patterns, "a name or a list of names")
    if several and listed is None:
        raise _bad("layers_pattern", patterns, "absent without layers_to_transform")
    return (frozenset(listed) if listed else None), tuple(several)


def _bad(field: str, value: object, wanted: str) -> AdapterRejectedError:
    return AdapterRejectedError(
        "bad_config", f"{field} is {shown(value)}; it must be {wanted}", param=field
    )
