"""Adapters saved by AdapterHub's library ``adapters``, 1.0 to 1.3.0.

The arithmetic is that of its own modules for Llama, Mistral and GPT-2, with eager attention.
"""

from __future__ import annotations

from typing import Final

from manyhats.adapters.formats.adapterhub.bottleneck import bottleneck_sections, place_bottlenecks
from manyhats.adapters.formats.adapterhub.fusion import fusion_sections
from manyhats.adapters.formats.adapterhub.lora import lora_sections
from manyhats.adapters.formats.adapterhub.places import Names
from manyhats.adapters.formats.adapterhub.prefix import prefix_section, prefix_tokens
from manyhats.adapters.formats.adapterhub.setup import Method, Setup, is_adapterhub, read_setup
from manyhats.adapters.formats.job import Job, assemble
from manyhats.adapters.parts import CompiledAdapter
from manyhats.adapters.strict_json import shown
from manyhats.errors import AdapterRejectedError

__all__ = ["REFUSED_ARCHITECTURES", "compile_adapterhub", "is_adapterhub"]

REFUSED_ARCHITECTURES: Final = {
    "prompt_tuning": "AdapterHub has it for no decoder that is served",
    "reft": "it changes the stream at chosen positions of the sequence",
    "mtl_lora": "it chooses between tasks for each input",
}
"""What ``architecture`` may say and is not served, each with why."""

_REFUSED_TENSORS: Final = {
    ".invertible_adapters.": "an invertible adapter behind the embedding",
    ".prefix_gates.": "a gate that is averaged over the whole sequence",
    "heads.": "a prediction head",
}


def compile_adapterhub(job: Job) -> CompiledAdapter:
    """Compile one adapter, a stack or a fusion; see ``compile_adapter``."""
    setup = read_setup(job.config)
    methods = [method for member in setup.members for method in member.methods]
    if not methods:
        raise AdapterRejectedError("bad_config", "configs is empty", param="configs")
    kinds = _by_kind(methods)
    _check_tensors(job)
    names = Names(job, setup)
    found = place_bottlenecks(job, names, kinds[None])
    if setup.fusion is not None:
        sections = fusion_sections(job, names, setup, setup.fusion, found)
    else:
        sections = bottleneck_sections(job, found)
        sections += lora_sections(job, names, kinds["lora"], stacked=len(setup.members) > 1)
        sections += [prefix_section(job, names, method) for method in kinds["prefix_tuning"]]
    if not any(section.tensors for section in sections):
        raise AdapterRejectedError("no_module_matched", "the configuration adapts no place at all")
    tokens = sum(prefix_tokens(job, method) for method in kinds["prefix_tuning"])
    return assemble(job, _family(setup, methods), sections, virtual_tokens=tokens)


def _by_kind(methods: list[Method]) -> dict[str | None, list[Method]]:
    """By ``architecture``."""
    kinds: dict[str | None, list[Method]] = {None: [], "lora": [], "prefix_tuning": []}
    for method in methods:
        kind = method.architecture
        if kind is not None and not isinstance(kind, str):
            raise _unknown(kind)
        if kind not in kinds:
            raise _unknown(kind)
        kinds[kind].append(method)
    if len(kinds["prefix_tuning"]) > 1:
        raise AdapterRejectedError(
            "unsupported_feature", "a stack of several prefixes is not served by this version"
        )
    return kinds


def _unknown(kind: object) -> AdapterRejectedError:
    why = REFUSED_ARCHITECTURES.get(kind) if isinstance(kind, str) else None
    if why is None:
        message = f"architecture {shown(kind)} is no method of AdapterHub that is known here"
    else:
        message = f"AdapterHub's {kind} is not served by this version: {why}"
    return AdapterRejectedError("unsupported_family", message, param="architecture")


def _check_tensors(job: Job) -> None:
    """Refuse by name what a file may hold beside its adapter."""
    for name in job.weights.tensors:
        for mark, what in _REFUSED_TENSORS.items():
            if mark in name or name.startswith(mark.lstrip(".")):
                raise AdapterRejectedError(
                    "unsupported_feature", f"{shown(name)} is of {what}, which is not served"
                )


def _family(setup: Setup, methods: list[Method]) -> str:
    """As a listing of adapters shows it."""
    if setup.fusion is not None:
        return "adapterhub_fusion"
    if len(setup.members) > 1:
        return "adapterhub_stack"
    if len(methods) > 1:
        return "adapterhub_union"
    config = methods[0].config
    if methods[0].architecture is None:
        kind = "compacter" if config.get("phm_layer") else "bottleneck"
    elif config.get("composition_mode") == "scale":
        kind = "ia3"
    else:
        kind = str(methods[0].architecture)
    return f"adapterhub_{kind}"
