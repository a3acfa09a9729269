"""A signal's window beside its reference, as a line of text or as a small SVG.

Two curves through nine quantiles each are all there is to draw: a few lines of text or of XML, for
which a plotting library with its fonts and backends would be the largest thing in the wheel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final
from xml.sax.saxutils import escape

_BLOCKS: Final = "▁▂▃▄▅▆▇█"
_BINS: Final = 16
_WIDTH, _ROW, _LEFT, _PLOT = 720, 56, 190, 380


def histogram(quantiles: Sequence[float], low: float, high: float) -> list[float]:
    """The mass of each of 16 bins in [low, high], equal mass between neighbouring quantiles."""
    mass = [0.0] * _BINS
    if not quantiles:
        return mass
    span = (high - low) or 1.0
    each = 1 / (len(quantiles) + 1)
    for a, b in zip((low, *quantiles), (*quantiles, high), strict=True):
        first, last = (min(_BINS - 1, max(0, int((x - low) / span * _BINS))) for x in (a, b))
        for i in range(first, last + 1):
            mass[i] += each / (last - first + 1)
    return mass


def sparkline(mass: Sequence[float], top: float) -> str:
    """One character a bin; ``top`` is the mass of a full one."""
    steps = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round(min(1.0, m / top) * steps) if top else 0] for m in mass)


def masses(signal: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """(reference, window) of a signal as the server shows it, on one scale."""
    reference, window = signal["reference"], signal.get("window") or {}
    if "counts" in reference:
        names = sorted({*reference["counts"], *window.get("counts", {})})
        return _shares(reference["counts"], names), _shares(window.get("counts", {}), names)
    known, now = reference.get("quantiles", []), window.get("quantiles", [])
    both = [*known, *now]
    if not both:
        return [], []
    low, high = min(both), max(both)
    room = (high - low) * 0.1
    return histogram(known, low - room, high + room), histogram(now, low - room, high + room)


def text_plot(signal: Mapping[str, Any]) -> str:
    """``reference|window`` as two sparklines."""
    known, now = masses(signal)
    top = max([*known, *now], default=0.0)
    return f"{sparkline(known, top)}|{sparkline(now, top)}"


def svg_plot(title: str, signals: Mapping[str, Mapping[str, Any]]) -> str:
    """Every signal in a row: bars of the reference (grey) and of the window (blue; red: alarm)."""
    height = _ROW * (len(signals) + 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="12" y="26" font-size="15">{escape(title)}</text>',
    ]
    for row, (name, signal) in enumerate(signals.items(), 1):
        parts += _row(row * _ROW, name, signal)
    return "\n".join([*parts, "</svg>", ""])


def _row(top: int, name: str, signal: Mapping[str, Any]) -> list[str]:
    known, now = masses(signal)
    most = max([*known, *now], default=0.0) or 1.0
    score = signal.get("score")
    told = signal["state"] if score is None else f"score {score:.2f}"
    color = "#c0392b" if signal["state"] == "alarm" else "#2471a3"
    base, full = top + _ROW - 14, _ROW - 20
    parts = [
        f'<text x="12" y="{base - 8}">{escape(name)}</text>',
        f'<text x="{_LEFT + _PLOT + 16}" y="{base - 8}" fill="{color}">{escape(told)}</text>',
        f'<line x1="{_LEFT}" y1="{base}" x2="{_LEFT + _PLOT}" y2="{base}" stroke="#999"/>',
    ]
    for masses_, shade, shift in ((known, "#b2babb", 0.0), (now, color, 0.45)):
        width = _PLOT / max(1, len(masses_))
        for i, mass in enumerate(masses_):
            high = full * mass / most
            parts.append(
                f'<rect x="{_LEFT + (i + shift) * width:.1f}" y="{base - high:.1f}" '
                f'width="{width * 0.42:.1f}" height="{high:.1f}" fill="{shade}"/>'
            )
    return parts


def _shares(counts: Mapping[str, int], names: Sequence[str]) -> list[float]:
    total = sum(counts.values()) or 1
    return [counts.get(name, 0) / total for name in names]
