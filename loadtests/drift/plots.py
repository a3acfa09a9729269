"""The experiment's plots, as SVG text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

Found = tuple[str, Sequence[int | None]]
"""A row's name, and each run's requests until the first alarm; None: none came."""

LEFT, RIGHT, TOP, ROW, WIDTH = 330, 70, 46, 20, 860
FONT = 'font-family="sans-serif" font-size="12"'


def strips(title: str, rows: Sequence[Found], most: int) -> str:
    """A line of points a row over a logarithmic axis from 10 to ``most`` requests; runs that raised
    no alarm are counted at the right.
    """
    span = math.log10(most) - 1

    def x(requests: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log10(max(10, requests)) - 1) / span

    height = TOP + ROW * len(rows) + 30
    bottom = height - 26
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" {FONT}>',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="18" font-weight="bold">{escape(title)}</text>',
        f'<text x="{WIDTH - 10}" y="36" text-anchor="end" fill="#555">none</text>',
    ]
    parts += [
        f'<line x1="{x(tick):.0f}" x2="{x(tick):.0f}" y1="{TOP - 8}" y2="{bottom}" '
        f'stroke="#ddd"/><text x="{x(tick):.0f}" y="{height - 8}" text-anchor="middle" '
        f'fill="#555">{tick:,}</text>'
        for tick in (10, 30, 100, 300, 1000, 3000)
        if tick <= most
    ]
    for number, (name, found) in enumerate(rows):
        y = TOP + ROW * number + 6
        none = sum(1 for one in found if one is None)
        parts.append(f'<text x="10" y="{y + 4}">{escape(name)}</text>')
        parts += [
            f'<circle cx="{x(one):.1f}" cy="{y}" r="3.5" fill="#0b6" fill-opacity="0.45"/>'
            for one in found
            if one is not None
        ]
        shown = f"{none} of {len(found)}" if none else ""
        parts.append(f'<text x="{WIDTH - 10}" y="{y + 4}" text-anchor="end">{shown}</text>')
    return "\n".join([*parts, "</svg>", ""])
