"""Fields of a configuration, as every family reads them.

Each field of a family's PEFT configuration is in one of three tables: it is honoured, or cannot
change what an already trained adapter computes, or is refused unless it is neutral. A field in none
of them is refused: a newer PEFT may have given it a meaning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from manyhats.adapters.files import AdapterLimits
from manyhats.adapters.strict_json import shown
from manyhats.errors import AdapterRejectedError

COMMON_HONOURED: Final = frozenset({"peft_type", "task_type"})
"""Fields of every family that are read and checked."""

COMMON_IRRELEVANT: Final[Mapping[str, str]] = {
    "auto_mapping": "names classes for PEFT's own loading",
    "peft_version": "who wrote the file; shown, not trusted",
    "base_model_name_or_path": "shown; the tensors' shapes decide whether the base fits",
    "revision": "of the base, as base_model_name_or_path",
    "inference_mode": "says whether the weights are to be trained further",
}
"""Fields of every family that cannot change the product, and why."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """``name``: what the field turns on. ``neutral``: values that turn nothing on, beside null."""

    name: str
    neutral: tuple[object, ...] = ()


@dataclass(frozen=True, slots=True)
class FieldTable:
    """A family's fields beside the common ones; see the module's docstring."""

    honoured: frozenset[str]
    irrelevant: Mapping[str, str]
    refused: Mapping[str, Refusal]

    @property
    def own(self) -> frozenset[str]:
        """Every field of the three tables."""
        return self.honoured | self.irrelevant.keys() | self.refused.keys()

    @property
    def known(self) -> frozenset[str]:
        """Every field that may be in a PEFT configuration."""
        return COMMON_HONOURED | COMMON_IRRELEVANT.keys() | self.own


def field_table(
    honoured: Iterable[str],
    irrelevant: Mapping[str, str],
    refused: Mapping[str, Refusal] | None = None,
) -> FieldTable:
    """A table of one family."""
    return FieldTable(frozenset(honoured), irrelevant, refused or {})


def check_fields(config: Mapping[str, object], table: FieldTable) -> None:
    """Refuse what is not served, and what is not known; the task must be CAUSAL_LM or absent.

    Raises:
        AdapterRejectedError: ``unsupported_feature`` or ``bad_config``; ``param`` is the field.
    """
    check_values(config, table.refused, table.known)
    task = config.get("task_type")
    if task is not None and task != "CAUSAL_LM":
        raise AdapterRejectedError(
            "unsupported_feature",
            f"task_type {shown(task)} is not served; only CAUSAL_LM is",
            param="task_type",
        )


def check_values(
    config: Mapping[str, object], refused: Mapping[str, Refusal], known: frozenset[str]
) -> None:
    """Refuse what ``refused`` says, and every field that is not ``known``; see ``check_fields``."""
    for field, refusal in refused.items():
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
    unknown = sorted(config.keys() - known)
    if unknown:
        raise AdapterRejectedError(
            "bad_config",
            f"the field {shown(unknown[0])} is not known here; it may change what is computed",
            param=unknown[0][:64],
        )


def switch(config: Mapping[str, object], field: str) -> bool:
    """A field that turns something on; null turns nothing on."""
    return config.get(field) is not None and boolean(config, field)


def boolean(config: Mapping[str, object], field: str, default: bool = False) -> bool:
    """A field that is true or false."""
    value = config.get(field, default)
    if not isinstance(value, bool):
        raise bad(field, value, "true or false")
    return value


def rank(field: str, value: object, limits: AdapterLimits) -> int:
    """A rank within the bound; also ``rank_too_large``."""
    if type(value) is not int or value < 1:
        raise bad(field, value, "a positive integer")
    if value > limits.max_rank:
        raise AdapterRejectedError(
            "rank_too_large",
            f"{field} is {shown(value)}, over the bound of {limits.max_rank}",
            param=field,
        )
    return value


def positive(field: str, value: object) -> int:
    """A positive integer that an error message can hold."""
    if type(value) is not int or not 1 <= value < 2**31:
        raise bad(field, value, "a positive integer")
    return value


def number(field: str, value: object) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise bad(field, value, "a finite number")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise bad(field, value, "a finite number")
    return found


def table(config: Mapping[str, object], field: str) -> list[tuple[str, object]]:
    """The entries of an object, from module names or patterns to values."""
    value = config.get(field)
    if value is None:
        return []
    if not isinstance(value, dict):
        raise bad(field, value, "an object from module names or patterns to numbers")
    return list(value.items())


def names(config: Mapping[str, object], field: str) -> str | frozenset[str]:
    """Module names or a pattern; empty where the field is absent."""
    value = config.get(field)
    if value is None:
        return frozenset()
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise bad(field, value, "a list of module names or a pattern")
    return frozenset(value)


def layers(config: Mapping[str, object]) -> tuple[frozenset[int] | None, tuple[str, ...]]:
    """``layers_to_transform`` (None: every layer) and ``layers_pattern``, as a list each."""
    value = config.get("layers_to_transform")
    listed = [value] if type(value) is int else value
    if listed is not None and (
        not isinstance(listed, list) or not all(type(item) is int for item in listed)
    ):
        raise bad("layers_to_transform", value, "an integer or a list of integers")
    patterns = config.get("layers_pattern")
    several = (
        [] if patterns in (None, "") else [patterns] if isinstance(patterns, str) else patterns
    )
    if not isinstance(several, list) or not all(isinstance(item, str) for item in several):
        raise bad("layers_pattern", patterns, "a name or a list of names")
    if several and listed is None:
        raise bad("layers_pattern", patterns, "absent without layers_to_transform")
    return (frozenset(listed) if listed else None), tuple(several)


def text(config: Mapping[str, object], field: str, default: str, choices: Iterable[str]) -> str:
    """One of a few words."""
    value = config.get(field, default)
    allowed = tuple(choices)
    if not isinstance(value, str) or value not in allowed:
        raise bad(field, value, f"one of {', '.join(allowed)}")
    return value


def name_list(config: Mapping[str, object], field: str) -> tuple[str, ...]:
    """A list of names; empty where the field is absent."""
    value = config.get(field)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise bad(field, value, "a list of module names")
    return tuple(value)


def bad(field: str, value: object, wanted: str) -> AdapterRejectedError:
    """The refusal of a field's value: ``bad_config``."""
    return AdapterRejectedError(
        "bad_config", f"{field} is {shown(value)}; it must be {wanted}", param=field
    )
