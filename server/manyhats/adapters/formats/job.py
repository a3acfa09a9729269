"""One compilation: what every importer is given, and how its result is put together.

An importer lists ``Section``s: tensors that must be in the file, and what is to be done with them.
``assemble`` checks the file against all of them (names, then shapes) before any is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import torch

from manyhats.adapters.base_weights import BaseWeights
from manyhats.adapters.files import AdapterLimits
from manyhats.adapters.finite import all_finite
from manyhats.adapters.formats.builder import Builder
from manyhats.adapters.formats.patterns import Matcher
from manyhats.adapters.parts import BaseSpec, CompiledAdapter, SiteSpec
from manyhats.adapters.strict_json import listed, shown
from manyhats.adapters.weights_file import WeightsFile
from manyhats.errors import AdapterRejectedError
from manyhats.types import Digest

PREFIX: Final = "base_model.model."
"""What PEFT puts before a module's name in a file."""

Shape = tuple[int, ...]
Tensors = Mapping[str, torch.Tensor]


class Derived(Protocol):
    """What was computed from an adapter and the base together, kept between compilations."""

    def get(self, name: str, compute: Callable[[], Tensors]) -> Tensors:
        """What ``compute`` returned for ``name`` once: fp32 tensors, by names of its own."""


class NotKept:
    """Computes anew each time."""

    def get(self, name: str, compute: Callable[[], Tensors]) -> Tensors:
        """As ``Derived.get``."""
        return compute()


@dataclass(frozen=True, slots=True)
class Job:
    """What a compilation starts from; see ``compile_adapter``."""

    config: Mapping[str, object]
    weights: WeightsFile
    base: BaseSpec
    limits: AdapterLimits
    digest: Digest
    dtype: torch.dtype
    base_weights: BaseWeights | None = None
    derived: Derived = field(default_factory=NotKept)
    matcher: Matcher = field(default_factory=lambda: Matcher())

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the file in fp32; see ``WeightsFile.load``."""
        return self.weights.load(name).to(torch.float32)

    def cast(self, tensor: torch.Tensor, source: str) -> torch.Tensor:
        """A contiguous copy in the parts' dtype; refused where a value does not fit it."""
        # contiguous_format, or the copy would keep a transposed layout
        cast = tensor.to(self.dtype, copy=True, memory_format=torch.contiguous_format)
        self.check_fits(cast, source)
        return cast

    def check_fits(self, cast: torch.Tensor, source: str) -> None:
        """Refuse a tensor in the parts' dtype that has a value which did not fit it."""
        if not all_finite(cast):
            dtype = str(self.dtype).removeprefix("torch.")
            raise AdapterRejectedError("non_finite", f"{source}, once scaled, does not fit {dtype}")

    def base_weight(self, site: SiteSpec) -> torch.Tensor:
        """The base's weight of a site; see ``BaseWeights.weight``."""
        if self.base_weights is None:
            raise AdapterRejectedError(
                "unsupported_feature",
                f"{site.name}: what this family adds depends on the base's weights, which are not "
                "at hand here",
            )
        return self.base_weights.weight(site.name)

    @property
    def hint(self) -> str:
        """For refusals that another base would explain."""
        origin = self.config.get("base_model_name_or_path", self.config.get("model_name"))
        named = isinstance(origin, str) and origin
        trained_on = shown(origin) if named else "a base that it does not name"
        return f" (is it an adapter for another base? It names {trained_on})"


@dataclass(frozen=True, slots=True)
class Section:
    """``tensors``: names in the file, with the shape each must have."""

    tensors: Mapping[str, Shape]
    build: Callable[[Builder], None]


def assemble(
    job: Job,
    family: str,
    sections: Sequence[Section],
    *,
    metadata: Mapping[str, str] | None = None,
    virtual_tokens: int = 0,
) -> CompiledAdapter:
    """Check the file against the sections, build them and return the adapter.

    Raises:
        AdapterRejectedError: ``unused_tensors``, ``missing_tensors``, ``shape_mismatch``,
            ``non_finite``, ``too_large``, and what the sections raise.
    """
    expected = {name: shape for section in sections for name, shape in section.tensors.items()}
    _check_names(job, expected)
    _check_shapes(job, expected)
    builder = Builder(job)
    for section in sections:
        section.build(builder)
    return CompiledAdapter(
        digest=job.digest,
        family=family,
        sites=builder.sites(),
        metadata=_metadata(job, builder, metadata or {}),
        virtual_tokens=virtual_tokens,
    )


def _check_names(job: Job, expected: Mapping[str, Shape]) -> None:
    """The file holds every tensor that the configuration calls for on this base, and no other."""
    present = job.weights.tensors.keys()
    missing = sorted(expected.keys() - present)
    unused = sorted(present - expected.keys())
    if unused:
        also = f"; missing: {listed(missing)}" if missing else ""
        raise AdapterRejectedError(
            "unused_tensors",
            f"{len(unused)} tensors belong to no module targeted on this base: "
            f"{listed(unused)}{also}{_no_bias_hint(unused, job.base)}{job.hint}",
        )
    if missing:
        raise AdapterRejectedError(
            "missing_tensors",
            f"{len(missing)} tensors are not in the file: {listed(missing)}{job.hint}",
        )


def _check_shapes(job: Job, expected: Mapping[str, Shape]) -> None:
    for name, shape in expected.items():
        found = job.weights.tensors[name].shape
        if found != shape:
            raise AdapterRejectedError(
                "shape_mismatch",
                f"{name} has shape {list(found)}; this base and the configuration need "
                f"{list(shape)}{job.hint}",
            )


def _no_bias_hint(unused: Iterable[str], base: BaseSpec) -> str:
    for name in unused:
        module = name.removeprefix(PREFIX).removesuffix(".bias").removesuffix(".base_layer")
        site = base.sites.get(module)
        if name.endswith(".bias") and site is not None and site.bias is None:
            return f"; the base's {module} has no bias"
    return ""


def _metadata(job: Job, builder: Builder, extra: Mapping[str, str]) -> dict[str, str]:
    """What a listing of adapters shows; nothing is decided by it."""
    metadata = {**builder.metadata(), **extra}
    for name in ("base_model_name_or_path", "peft_version", "model_name"):
        value = job.config.get(name)
        if isinstance(value, str) and value:
            metadata[name] = value[:256]
    return metadata
