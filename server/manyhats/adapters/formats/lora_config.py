"""LoRA's configuration, every field of PEFT 0.21.2's LoraConfig put in one of three tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from manyhats.adapters.files import AdapterLimits
from manyhats.adapters.formats.fields import (
    Refusal,
    bad,
    boolean,
    check_fields,
    field_table,
    name_list,
    number,
    rank,
    switch,
    table,
    text,
)
from manyhats.adapters.formats.targets import Selection, selection
from manyhats.adapters.strict_json import shown
from manyhats.errors import AdapterRejectedError

HONOURED: Final = frozenset(
    {
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
        "use_dora",
        "lora_bias",
        "modules_to_save",
        "trainable_token_indices",
        "ensure_weight_tying",
    }
)
"""Fields that ``parse_settings`` reads and checks."""

IRRELEVANT: Final[Mapping[str, str]] = {
    "lora_dropout": "acts in training only",
    "megatron_core": "a module's name, read with megatron_config only, which is refused",
    "loftq_config": "read with init_lora_weights='loftq' only, which is refused",
    "eva_config": "how A was initialised; the base is untouched",
    "corda_config": "read with init_lora_weights='corda' only, which is refused",
    "lora_ga_config": "read with init_lora_weights='lora_ga' only, which is refused",
    "qalora_group_size": "read with use_qalora only, which is refused",
    "runtime_config": "where PEFT computes, not what; PEFT ignores it in a file",
    "merge_weights": "PEFT 0.2 and older: whether to merge for inference; the sum is the same",
}
"""Fields whose value cannot change the product at inference, and why."""


REFUSED: Final[Mapping[str, Refusal]] = {
    "use_qalora": Refusal("QALoRA", (False,)),
    "target_parameters": Refusal("LoRA on bare parameters (target_parameters)", ([],)),
    "layer_replication": Refusal("replicated layers", ([],)),
    "arrow_config": Refusal("Arrow routing"),
    "alora_invocation_tokens": Refusal("activated LoRA (aLoRA)"),
    "megatron_config": Refusal("LoRA on Megatron's parallel layers", ({},)),
    "use_bdlora": Refusal("block-diagonal LoRA (BD-LoRA)"),
    "kasa_config": Refusal("KaSA, which changes the base's weights"),
    "monteclora_config": Refusal("MonteCLoRA"),
    "velora_config": Refusal("VeLoRA"),
    "enable_lora": Refusal("PEFT 0.2's merged projections (enable_lora)"),
}
"""Fields that change what is computed, or which tensors are there: served only where neutral."""

TABLE: Final = field_table(HONOURED, IRRELEVANT, REFUSED)
"""All of them."""

# These initialisations subtract from the base's weights what they put into A and B. PEFT's
# save_pretrained with path_initial_model_for_weight_conversion turns the result into plain LoRA and
# writes init_lora_weights: true; any other file is right only over the changed base, which is not
# the one served.
_CHANGES_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
_KEEPS_BASE: Final = frozenset({"gaussian", "eva", "orthogonal", "mica"})

_BIAS_MODES: Final = ("none", "all", "lora_only")


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The honoured fields, checked; absent ones have LoraConfig's defaults."""

    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    selection: Selection
    bias: str
    modules_to_save: tuple[str, ...]
    ensure_weight_tying: bool

    @property
    def family(self) -> str:
        """What it is called."""
        return "dora" if self.use_dora else "rslora" if self.use_rslora else "lora"

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
    check_fields(config, TABLE)
    _check_init(config.get("init_lora_weights", True))
    # PEFT itself corrects a flag that does not fit the layer's type, and it matters to merging
    # alone
    boolean(config, "fan_in_fan_out")
    settings = LoraSettings(
        r=rank("r", config.get("r", 8), limits),
        lora_alpha=number("lora_alpha", config.get("lora_alpha", 8)),
        rank_pattern={k: rank("rank_pattern", v, limits) for k, v in table(config, "rank_pattern")},
        alpha_pattern={k: number("alpha_pattern", v) for k, v in table(config, "alpha_pattern")},
        use_rslora=boolean(config, "use_rslora"),
        use_dora=switch(config, "use_dora"),
        lora_bias=switch(config, "lora_bias"),
        selection=selection(config),
        bias=text(config, "bias", "none", _BIAS_MODES),
        modules_to_save=name_list(config, "modules_to_save"),
        ensure_weight_tying=switch(config, "ensure_weight_tying"),
    )
    if settings.use_dora and settings.lora_bias:
        raise bad("lora_bias", True, "false beside use_dora")
    return settings


def _check_init(value: object) -> None:
    if isinstance(value, bool):
        return
    if not isinstance(value, str):
        raise bad("init_lora_weights", value, "true, false or a name")
    if value.lower().startswith(_CHANGES_BASE):
        raise AdapterRejectedError(
            "unsupported_feature",
            f"init_lora_weights {shown(value)} changes the base's weights; save with PEFT's "
            "path_initial_model_for_weight_conversion, which converts it to plain LoRA",
            param="init_lora_weights",
        )
    if value.lower() not in _KEEPS_BASE:
        raise bad("init_lora_weights", value, "an initialisation that is known here")
