"""Which modules of the base a configuration means, and with which rank and alpha.

The rules are those of PEFT 0.21.2: ``check_target_module_exists`` and
``_maybe_include_all_linear_layers`` (peft/tuners/tuners_utils.py) and ``get_pattern_key``
(peft/utils/other.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from manyhats.adapters.formats.fields import bad, layers, names
from manyhats.adapters.formats.patterns import Matcher, is_literal, literal_suffix
from manyhats.adapters.parts import BaseSpec, SiteKind, SiteSpec
from manyhats.adapters.strict_json import listed, shown
from manyhats.errors import AdapterRejectedError

_Value = TypeVar("_Value", int, float)

_ALL_LINEAR: Final = "all-linear"
# PEFT's templates; the first numbered segment of a name is the layer's index, hence the lazy .*?
_ANY_LAYER: Final = r".*?\.[^.]*\.(?P<idx>\d+)\."
_NAMED_LAYER: Final = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
_PATTERN_KEY: Final = r"(.*\.)?({})$"

LINEAR_KINDS: Final = frozenset({SiteKind.LINEAR, SiteKind.HEAD})
"""What a tuner of torch's linear layers takes."""

# attentions and residual streams are sites of other formats
_MODULES: Final = LINEAR_KINDS | {SiteKind.NORM, SiteKind.EMBEDDING}
_KIND_NAMES: Final[Mapping[SiteKind, str]] = {
    SiteKind.LINEAR: "a linear layer",
    SiteKind.NORM: "a normalization",
    SiteKind.EMBEDDING: "an embedding",
    SiteKind.HEAD: "the output head",
}


@dataclass(frozen=True, slots=True)
class Selection:
    """Which modules a configuration means. ``layers_to_transform`` None: every layer."""

    target_modules: str | frozenset[str]
    exclude_modules: str | frozenset[str] = frozenset()
    layers_to_transform: frozenset[int] | None = None
    layers_pattern: tuple[str, ...] = ()


def selection(config: Mapping[str, object]) -> Selection:
    """The fields that select modules, checked; a family without one of them has it absent.

    Raises:
        AdapterRejectedError: ``bad_config``.
    """
    indices, patterns = layers(config)
    found = Selection(
        target_modules=names(config, "target_modules"),
        exclude_modules=names(config, "exclude_modules"),
        layers_to_transform=indices,
        layers_pattern=patterns,
    )
    if config.get("target_modules") is None:
        raise bad("target_modules", None, "a list of module names, a pattern or 'all-linear'")
    if isinstance(found.target_modules, str) and (indices is not None or patterns):
        raise bad(
            "layers_to_transform",
            config.get("layers_to_transform"),
            "absent beside a pattern in target_modules",
        )
    return found


def matched_sites(
    settings: Selection,
    base: BaseSpec,
    matcher: Matcher,
    *,
    kinds: frozenset[SiteKind] = LINEAR_KINDS,
    transposed: bool = True,
    family: str = "LoRA",
) -> list[SiteSpec]:
    """The sites that the configuration targets, in the base's order; never empty.

    Raises:
        AdapterRejectedError: ``no_module_matched``; ``unsupported_site`` where one is not of
            ``kinds``, or is a Conv1D and ``transposed`` is false; ``bad_config`` for a bad pattern.
    """
    targeted = _target_test(settings, matcher)
    excluded = _exclude_test(settings, matcher)
    sites = [
        site
        for site in base.sites.values()
        if site.kind in _MODULES and not excluded(site.name) and targeted(site)
    ]
    if not sites:
        raise _nothing_matched(settings, base)
    for site in sites:
        if site.kind not in kinds or (site.transposed and not transposed):
            what = _KIND_NAMES[site.kind] if site.kind not in kinds else "a Conv1D"
            raise AdapterRejectedError(
                "unsupported_site",
                f"target_modules names {site.name}, {what}; {family} is not served there",
                param="target_modules",
            )
    return sites


class PatternTable(Generic[_Value]):
    """``rank_pattern`` or ``alpha_pattern``: the first key that matches a name's end decides."""

    def __init__(self, patterns: Mapping[str, _Value], field: str, matcher: Matcher) -> None:
        self._keys: list[tuple[str, bool, _Value]] = [
            (key, is_literal(key), value) for key, value in patterns.items()
        ]
        self._field = field
        self._matcher = matcher

    def get(self, name: str, default: _Value) -> _Value:
        """The value for the module ``name``. Raises AdapterRejectedError for a bad pattern."""
        for key, literal, value in self._keys:
            if literal:
                found = literal_suffix(key, name)
            else:
                found = self._matcher.compile(key, self._field, _PATTERN_KEY).fullmatch(name)
            if found:
                return value
        return default


def _suffixes(name: str) -> Iterator[str]:
    """``name`` and what is left of it after each of its dots."""
    yield name
    while (dot := name.find(".")) >= 0:
        name = name[dot + 1 :]
        yield name


def _target_test(settings: Selection, matcher: Matcher) -> Callable[[SiteSpec], bool]:
    targets = settings.target_modules
    if isinstance(targets, str):
        if targets.lower() == _ALL_LINEAR:
            return lambda site: site.kind is SiteKind.LINEAR
        pattern = matcher.compile(targets, "target_modules")
        return lambda site: pattern.fullmatch(site.name)
    in_layer = _layer_test(settings, matcher)
    if not any("." in target for target in targets):  # then it can only be the last segment
        return lambda site: (
            site.name.rpartition(".")[2] in targets
            and (site.name in targets or in_layer(site.name))
        )
    # a name given in full is not subject to layers_to_transform
    return lambda site: (
        site.name in targets
        or (any(suffix in targets for suffix in _suffixes(site.name)) and in_layer(site.name))
    )


def _exclude_test(settings: Selection, matcher: Matcher) -> Callable[[str], bool]:
    excluded = settings.exclude_modules
    if not excluded:
        return lambda name: False
    if isinstance(excluded, str):
        return matcher.compile(excluded, "exclude_modules").fullmatch
    return lambda name: any(suffix in excluded for suffix in _suffixes(name))


def _layer_test(settings: Selection, matcher: Matcher) -> Callable[[str], bool]:
    layers = settings.layers_to_transform
    if not layers:
        return lambda name: True
    sources = settings.layers_pattern
    if sources:
        patterns = [matcher.compile(source, "layers_pattern", _NAMED_LAYER) for source in sources]
    else:
        patterns = [matcher.compile(_ANY_LAYER, "layers_to_transform")]

    def test(name: str) -> bool:
        # PEFT stops at the first pattern that matches at all
        for pattern in patterns:
            index = pattern.group_at_start(name, "idx")
            if index is not None:
                return index.isdecimal() and int(index) in layers
        return False

    return test


def _nothing_matched(settings: Selection, base: BaseSpec) -> AdapterRejectedError:
    targets = settings.target_modules
    wanted = shown(targets) if isinstance(targets, str) else f"[{listed(sorted(targets))}]"
    linear = [site.name for site in base.sites.values() if site.kind is SiteKind.LINEAR]
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in linear)
    example = f" (for instance {linear[0]})" if linear else ""
    limits = " within exclude_modules, layers_to_transform and layers_pattern"
    narrowed = bool(settings.exclude_modules) or bool(settings.layers_to_transform)
    return AdapterRejectedError(
        "no_module_matched",
        f"target_modules {wanted} matches no module of the base{limits if narrowed else ''}; "
        f"it has {listed(leaves)}{example}",
        param="target_modules",
    )
