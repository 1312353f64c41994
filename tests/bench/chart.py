"""A chart of ratios as SVG: a row for each question, a dot for each peer on a logarithmic scale, a line at 1."""

from __future__ import annotations

import math
from pathlib import Path

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
LEFT, RIGHT, TOP, ROW = 215, 30, 64, 30


def chart(title: str, ratios: dict[str, dict[str, float]], path: Path) -> None:
    """Draw `ratios` (question → peer → how many times faster we are) into a file."""
    peers = list(next(iter(ratios.values())))
    values = [ratio for of_question in ratios.values() for ratio in of_question.values()]
    low, high = (10 ** way(math.log10(edge)) for way, edge in ((math.floor, min(*values, 1)), (math.ceil, max(*values, 1))))
    width, height = 860, TOP + ROW * len(ratios) + 34

    def x(ratio: float) -> float:
        return LEFT + (width - LEFT - RIGHT) * math.log(ratio / low) / math.log(high / low)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/><text x="12" y="22" font-size="15" font-weight="bold">{title}</text>',
    ]
    place = 12.0
    for peer, colour in zip(peers, COLOURS, strict=False):
        lines.append(f'<circle cx="{place + 6}" cy="42" r="5" fill="{colour}"/><text x="{place + 16}" y="46">{peer}</text>')
        place += 30 + 7.4 * len(peer)
    tick = low
    while tick <= high * 1.0001:
        for step in (1, 2, 5):
            if (at := tick * step) <= high * 1.0001:
                weight = ' stroke-width="2" stroke="#444"' if at == 1 else ' stroke="#ddd"'
                lines.append(f'<line x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{TOP - 8}" y2="{height - 30}"{weight}/>')
                lines.append(f'<text x="{x(at):.1f}" y="{height - 12}" text-anchor="middle" fill="#555">{at:g}</text>')
        tick *= 10
    for number, (question, of_question) in enumerate(ratios.items()):
        y = TOP + ROW * number + ROW / 2 - 4
        lines.append(f'<text x="{LEFT - 12}" y="{y + 4}" text-anchor="end">{question}</text>')
        for peer, colour in zip(peers, COLOURS, strict=False):
            lines.append(f'<circle cx="{x(of_question[peer]):.1f}" cy="{y}" r="6" fill="{colour}" fill-opacity="0.85"/>')
    path.write_text("\n".join([*lines, "</svg>\n"]))
