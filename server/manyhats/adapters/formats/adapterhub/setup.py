"""What AdapterHub's files say: one adapter, or several that are composed.

``save_adapter`` of ``adapters`` 1.3.0 writes one adapter: ``config`` (one method, or the
``configs`` of a union) beside ``name``, ``model_type`` and ``version``. Several are one folder of
examples/export_adapterhub.py: ``composition`` (``stack`` or ``fuse``), ``adapters`` (what was
written for each, in order) and ``fusion`` (what ``save_adapter_fusion`` wrote).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from manyhats.adapters.formats.fields import Refusal, bad, check_values, text
from manyhats.adapters.strict_json import listed, shown
from manyhats.errors import AdapterRejectedError

_MAX_MEMBERS: Final = 16
_SINGLE: Final = frozenset(
    {"config", "hidden_size", "model_class", "model_name", "model_type", "name", "version"}
)
_COMPOSED: Final = frozenset({"composition", "adapters", "fusion", "model_name"})
_HEADS: Final = {
    field: Refusal("a prediction head", ())
    for field in ("head_type", "num_labels", "label2id", "prediction_heads")
}
_VERSION: Final = re.compile(r"adapters\.(\d{1,4})\.(\d{1,4})\.[0-9A-Za-z.]{1,16}")


@dataclass(frozen=True, slots=True)
class Method:
    """One method of an adapter: ``config`` has its fields. ``old_scaling``: it is of a version
    whose LoRA was not scaled by alpha / r, see ``AdapterLoader._fix_backward_compat``.
    """

    adapter: str
    config: Mapping[str, object]
    old_scaling: bool

    @property
    def architecture(self) -> object:
        """None for a bottleneck."""
        return self.config.get("architecture")


@dataclass(frozen=True, slots=True)
class Member:
    """One adapter; ``methods`` are several in a union."""

    name: str
    model_type: object
    methods: tuple[Method, ...]


@dataclass(frozen=True, slots=True)
class Setup:
    """``fusion``: AdapterFusion's configuration, None for a single adapter and for a stack."""

    members: tuple[Member, ...]
    fusion: Mapping[str, object] | None

    @property
    def fusion_name(self) -> str:
        """As AdapterHub names it."""
        return ",".join(member.name for member in self.members)


def is_adapterhub(config: Mapping[str, object]) -> bool:
    """Whether AdapterHub, or the script for it, wrote the configuration."""
    return "peft_type" not in config and ("config" in config or "composition" in config)


def read_setup(config: Mapping[str, object]) -> Setup:
    """Check the fields around the methods.

    Raises:
        AdapterRejectedError: ``bad_config``, ``unsupported_feature``.
    """
    if "composition" not in config:
        return Setup((_member(config, "config"),), None)
    check_values(config, {}, _COMPOSED)
    way = text(config, "composition", "", ("stack", "fuse"))
    files = config.get("adapters")
    if not isinstance(files, list) or not 0 < len(files) <= _MAX_MEMBERS:
        raise bad("adapters", files, f"a list of 1 to {_MAX_MEMBERS} configurations")
    members = tuple(_member(file, "adapters") for file in files)
    names = [member.name for member in members]
    if len(set(names)) != len(names):
        raise bad("adapters", listed(names), "adapters of different names")
    fusion = _object(config, "fusion") if way == "fuse" else None
    if way == "stack" and config.get("fusion") is not None:
        raise bad("fusion", config["fusion"], "absent in a stack")
    if fusion is not None:
        _check_fusion_of(fusion, names)
        fusion = _object(fusion, "config")
    return Setup(members, fusion)


def _member(file: object, field: str) -> Member:
    if not isinstance(file, dict):
        raise bad(field, file, "what AdapterHub wrote as adapter_config.json")
    check_values(file, _HEADS, _SINGLE | _HEADS.keys())
    name = file.get("name")
    if not isinstance(name, str) or not name:
        raise bad("name", name, "the adapter's name")
    old = _is_old(file)
    config = _object(file, "config")
    methods = (config,)
    if config.get("architecture") == "union":
        check_values(config, {}, frozenset({"architecture", "configs"}))
        several = config.get("configs")
        if not isinstance(several, list) or not all(isinstance(item, dict) for item in several):
            raise bad("configs", several, "a list of configurations")
        methods = tuple(several)
    return Member(
        name, file.get("model_type"), tuple(Method(name, method, old) for method in methods)
    )


def used_twice(place: str) -> AdapterRejectedError:
    """The refusal of a union two of whose methods are at one place, as the library refuses it."""
    return AdapterRejectedError(
        "bad_config", f"{place}: two methods of one adapter are there", param="configs"
    )


def _is_old(file: Mapping[str, object]) -> bool:
    """Of adapters 1.0; what is older still is refused."""
    version = file.get("version")
    found = _VERSION.fullmatch(version) if isinstance(version, str) else None
    if found is None or int(found[1]) < 1:
        raise AdapterRejectedError(
            "unsupported_feature",
            f"version is {shown(version)}: only what adapters 1.0 or newer saved is read (load and "
            "save it there)",
            param="version",
        )
    return (int(found[1]), int(found[2])) < (1, 1)


def _check_fusion_of(fusion: Mapping[str, object], names: list[str]) -> None:
    saved = fusion.get("name")
    if saved != ",".join(names):
        raise bad("fusion", saved, f"the fusion of {listed(names)}, in this order")


def _object(config: Mapping[str, object], field: str) -> Mapping[str, object]:
    value = config.get(field)
    if not isinstance(value, dict):
        raise bad(field, value, "an object")
    return value
