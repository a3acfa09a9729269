"""Which version a name means: the stable one, a canary beside it for a share of callers, or the
base. Pure values and the changes between them; nothing here touches the disk.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from manyhats.errors import ConflictError

BASELINE: Final = 0
"""In the place of a version's number: the base itself. Versions count from 1."""

_BASELINE_SHOWN: Final = "baseline"


class Side(enum.StrEnum):
    """The sides of a canary, as the header ``x-manyhats-route`` names them."""

    STABLE = "stable"
    CANARY = "canary"


@dataclass(frozen=True, slots=True)
class RouteHint:
    """What a request says of the side it wants.

    ``side``: chosen by the caller. Otherwise it is drawn by ``sticky``, the same each time; ``""``:
    nothing to stick to, each request is drawn anew.
    """

    sticky: str = ""
    side: Side | None = None


@dataclass(frozen=True, slots=True)
class Schedule:
    """A canary's way up: ``steps`` in percent, each lasting ``step_s`` seconds.

    ``step`` is the index of the present one, ``due`` its end in Unix seconds. ``held`` is the
    reason why it does not go on, ``""`` where it does.
    """

    steps: tuple[float, ...]
    step_s: float
    step: int
    due: float
    held: str = ""


@dataclass(frozen=True, slots=True)
class Canary:
    """A version that gets ``percent`` (over 0, up to 100) of the callers."""

    version: int
    percent: float
    schedule: Schedule | None = None


@dataclass(frozen=True, slots=True)
class Shadow:
    """A version that also runs for ``percent`` (over 0, up to 100) of the requests, unseen."""

    version: int
    percent: float


@dataclass(frozen=True, slots=True)
class Route:
    """What a name means. ``stable`` and ``previous`` are versions or BASELINE.

    ``previous`` is what was stable before; None where nothing was. ``pinned``: the versions that
    stay on the device, ascending.
    """

    stable: int
    previous: int | None = None
    canary: Canary | None = None
    shadow: Shadow | None = None
    pinned: tuple[int, ...] = ()

    def target(self, hint: RouteHint, *, draw: float) -> int:
        """The version that a request gets, or BASELINE. ``draw`` in [0, 100), see ``drawn``."""
        if self.canary is None or hint.side is Side.STABLE:
            return self.stable
        chosen = hint.side is Side.CANARY or draw < self.canary.percent
        return self.canary.version if chosen else self.stable

    def holds(self, version: int) -> bool:
        """Whether requests may get the version, or it is its shadow, or pinned."""
        others = {part.version for part in (self.canary, self.shadow) if part is not None}
        return version == self.stable or version in others or version in self.pinned

    def shown(self) -> dict[str, Any]:
        """The route as JSON; ``parse`` reads it."""
        canary: dict[str, Any] | None = None
        if self.canary is not None:
            canary = {"version": self.canary.version, "percent": self.canary.percent}
            schedule = self.canary.schedule
            canary["schedule"] = schedule and {
                "steps": list(schedule.steps),
                "step_s": schedule.step_s,
                "step": schedule.step,
                "due": schedule.due,
                "held": schedule.held,
            }
        previous = None if self.previous is None else _shown(self.previous)
        stable = _shown(self.stable)
        shown: dict[str, Any] = {"stable": stable, "previous": previous, "canary": canary}
        if self.shadow is not None:
            shown["shadow"] = {"version": self.shadow.version, "percent": self.shadow.percent}
        if self.pinned:
            shown["pinned"] = list(self.pinned)
        return shown

    def described(self) -> str:
        """The route in words."""
        words = [f"stable {_shown(self.stable)}"]
        for kind, part in (("canary", self.canary), ("shadow", self.shadow)):
            if part is not None:
                words.append(f"{kind} {part.version} ({part.percent:g} %)")
        if self.pinned:
            words.append(f"pinned {', '.join(map(str, self.pinned))}")
        return ", ".join(words)


def parse(value: Mapping[str, Any]) -> Route:
    """The route that ``shown`` gave."""
    found, canary = value.get("canary"), None
    if found is not None:
        steps = found.get("schedule")
        schedule = steps and Schedule(**{**steps, "steps": tuple(steps["steps"])})
        canary = Canary(found["version"], found["percent"], schedule)
    previous = value.get("previous")
    shadow = value.get("shadow")
    return Route(
        _number(value["stable"]),
        None if previous is None else _number(previous),
        canary,
        shadow and Shadow(**shadow),
        tuple(value.get("pinned", ())),
    )


def drawn(key: bytes, name: str, version: int, sticky: str) -> float:
    """Where ``sticky`` stands in [0, 100) for one canary: keyed BLAKE2b of both.

    Uniform, and the same at every percentage, so who has the canary keeps it as its share grows.
    Each canary draws anew: it is not always the same callers who try what is new.
    """
    told = f"{name}@{version}\0{sticky}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(told, key=key, digest_size=8).digest()
    return int.from_bytes(digest[:7], "big") / 2**56 * 100


def registered(route: Route | None, version: int, newest: int, promote: bool | None) -> Route:
    """The route after ``version`` was registered; ``newest`` was the newest one before it.

    The first version of a name is its stable one. A later one becomes it where ``promote`` is true,
    or is None and the route stood at the newest version without a canary: it stays where somebody
    has moved it away from there.
    """
    if route is None:
        return Route(version)
    follows = route.canary is None and route.stable == newest
    return promoted(route, version) if promote or (promote is None and follows) else route


def promoted(route: Route, version: int) -> Route:
    """``version`` is the stable one; no canary is left, and it is its own shadow no longer."""
    previous = route.previous if route.stable == version else route.stable
    shadow = None if route.shadow and route.shadow.version == version else route.shadow
    return replace(route, stable=version, previous=previous, canary=None, shadow=shadow)


def with_canary(
    route: Route, version: int, percent: float, schedule: Schedule | None = None
) -> Route:
    """``version`` gets ``percent`` of the callers; 0 ends the canary. Raises ConflictError."""
    if not percent:
        return replace(route, canary=None)
    if version == route.stable:
        raise ConflictError(
            f"version {version} is the stable one: another one can be its canary", param="version"
        )
    return replace(route, canary=Canary(version, percent, schedule))


def with_shadow(route: Route, version: int, percent: float) -> Route:
    """``version`` runs unseen for ``percent`` of the requests; 0 ends it. Raises ConflictError."""
    if not percent:
        return replace(route, shadow=None)
    if version == route.stable:
        raise ConflictError(
            f"version {version} is the stable one: another one can be its shadow", param="version"
        )
    return replace(route, shadow=Shadow(version, percent))


def with_pin(route: Route, version: int, *, pinned: bool) -> Route:
    """``version`` stays on the device, or need not any longer."""
    others = {v for v in route.pinned if v != version}
    return replace(route, pinned=tuple(sorted(others | {version} if pinned else others)))


def undone(route: Route) -> Route:
    """The canary ended; where there is none, what was stable before. Raises ConflictError."""
    if route.canary is not None:
        return replace(route, canary=None)
    if route.previous is None:
        raise ConflictError("there is nothing before this to roll back to", param="to")
    return promoted(route, route.previous)


def without(route: Route, version: int) -> Route:
    """The route once ``version``, which is not the stable one, is gone."""
    return replace(
        route,
        previous=None if route.previous == version else route.previous,
        canary=None if route.canary and route.canary.version == version else route.canary,
        shadow=None if route.shadow and route.shadow.version == version else route.shadow,
        pinned=tuple(v for v in route.pinned if v != version),
    )


def _shown(version: int) -> int | str:
    return _BASELINE_SHOWN if version == BASELINE else version


def _number(shown: int | str) -> int:
    return BASELINE if isinstance(shown, str) else shown
