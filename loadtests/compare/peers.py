"""Every target, and the recipe of each peer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from compare import libraries, llama, ours, vllm
from compare.environments import Recipe, install
from compare.target import Place, Target

OURS = "ours"
RECIPES: Mapping[str, Callable[[], Recipe]] = {
    vllm.PEER: vllm.recipe,
    llama.PEER: llama.recipe,
    libraries.PEER: libraries.recipe,
}


def all_targets(place: Place) -> list[Target]:
    """Ours first."""
    return [m for made in (ours, vllm, llama, libraries) for m in made.targets(place)]


def chosen(place: Place, names: Sequence[str] | None) -> list[Target]:
    """Those that are named, by wildcards too (``vllm-*``), or whose peer is (``ours``: Manyhats'
    own); all without names. What is both a target's name and a peer's is the target.

    Raises ValueError for a name that is nobody's.
    """
    targets = all_targets(place)
    if names is None:
        return targets
    known = {t.name for t in targets}
    peers = {t.peer or OURS for t in targets} - known

    def named(target: Target, name: str) -> bool:
        own = fnmatchcase(target.name, name)
        return own or (name in peers and name == (target.peer or OURS))

    if unknown := [name for name in names if not any(named(t, name) for t in targets)]:
        raise ValueError(f"--targets: unknown {unknown}; known are {sorted(known | peers)}")
    return [t for t in targets if any(named(t, name) for name in names)]


def prepare_files(peer: str, place: Place) -> None:
    """What a peer needs of the model in a form of its own. Raises UnavailableError."""
    if peer == llama.PEER:
        install(llama.conversions(place), place.work / "gguf" / place.model.name)
