"""Where AdapterHub puts an adapter's modules in a decoder, and how it calls their tensors.

After adapters/models/*/mixin_*.py of ``adapters`` 1.3.0, by ``model_type``. LoRA's "intermediate"
and "output" are what the mixins name so: of Llama the down and the up projection.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from manyhats.adapters.formats.adapterhub.setup import Member, Method, Setup
from manyhats.adapters.formats.fields import bad
from manyhats.adapters.formats.job import Job
from manyhats.adapters.parts import SiteKind, SiteSpec
from manyhats.adapters.strict_json import listed, shown
from manyhats.errors import AdapterRejectedError

_LAYER: Final = re.compile(r"(.+?\.(\d{1,6}))\.")

ATTENTION, MLP = "attention_adapters", "output_adapters"
RESIDUAL_PLACES: Final[Mapping[str, tuple[str, str]]] = {
    "mh_adapter": (ATTENTION, "after_attention"),
    "output_adapter": (MLP, "after_mlp"),
}
"""By field of a bottleneck: AdapterHub's module in the layer, and the residual site."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A family of decoders: what in a layer LoRA is put on. ``merged``: the one module that
    computes q, k and v, in place of ``attention``. ``rotates``: by halves, as Llama does.
    """

    attention: Mapping[str, str]
    intermediate: str
    output: str
    merged: str | None = None
    rotates: bool = True


_LLAMA: Final = Layout(
    {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"},
    "mlp.down_proj",
    "mlp.up_proj",
)
LAYOUTS: Final[Mapping[str, Layout]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "gpt2": Layout({}, "mlp.c_fc", "mlp.c_proj", merged="attn.c_attn", rotates=False),
}
"""By ``model_type``."""


class Names:
    """The base's layers, and the tensors' names in this file."""

    def __init__(self, job: Job, setup: Setup) -> None:
        self._job = job
        self.layout = _layout(setup.members)
        found: dict[str, None] = {}
        for site in job.base.sites:
            if match := _LAYER.match(site):
                found[match[1]] = None
        self.layers = list(found)
        if len(self.layers) != job.base.num_layers:
            raise AdapterRejectedError(
                "unsupported_site", "the base's layers are not numbered one after the other"
            )
        # saved from a model without a head, the names do not begin with the base model's
        self.root = self.layers[0].partition(".")[0] + "."
        if not any(name.startswith(self.root) for name in job.weights.tensors):
            self._cut = len(self.root)
        else:
            self._cut = 0

    def tensor(self, name: str) -> str:
        """As the file calls the tensor that a whole model calls ``name``."""
        return name[self._cut :]

    def site(self, name: str, kind: SiteKind) -> SiteSpec:
        """A site of the base; ``unsupported_site`` where it has none of that name and kind."""
        site = self._job.base.sites.get(name)
        if site is None or site.kind is not kind:
            raise AdapterRejectedError(
                "unsupported_site", f"{name} is no place of this base{self._job.hint}"
            )
        return site

    def worn(self, method: Method) -> Iterator[str]:
        """The layers that are not left out."""
        out = left_out(method.config)
        for index, layer in enumerate(self.layers):
            if index not in out:
                yield layer


def left_out(config: Mapping[str, object]) -> frozenset[int]:
    """``leave_out``: indices of layers."""
    value = config.get("leave_out")
    if value is None:
        return frozenset()
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise bad("leave_out", value, "a list of layers' numbers")
    return frozenset(value)


def _layout(members: tuple[Member, ...]) -> Layout:
    kinds = {member.model_type if isinstance(member.model_type, str) else "" for member in members}
    if len(kinds) != 1:
        raise bad("model_type", listed(sorted(kinds)), "the same of all adapters")
    kind = kinds.pop()
    layout = LAYOUTS.get(kind)
    if layout is None:
        raise AdapterRejectedError(
            "unsupported_feature",
            f"adapters of AdapterHub for model_type {shown(kind)} are not served by this version; "
            f"those for {listed(LAYOUTS)} are",
            param="model_type",
        )
    return layout
