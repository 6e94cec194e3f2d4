"""Draw the results of `make bench` as a chart: debits/s of the service and its peers."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from xml.sax.saxutils import escape

from bench.peers import PLAIN, RPC, SERVICE_NAME, WITHOUT_GROUP_COMMIT
from bench.wrk import HOT_USER, SPREAD_OUT

TITLE = "Debits per second at 128 connections"
CONNECTIONS = 128
LABELS = {
    SERVICE_NAME: "service",
    WITHOUT_GROUP_COMMIT: "service without group commit",
    PLAIN: "plain implementation",
    RPC: "the RPC directly",
}
PROFILES = {SPREAD_OUT: "spread-out", HOT_USER: "hot-user"}  # and their CSS classes

WIDTH = 760
HEIGHT = 330
LEFT = 210
TOP = 70
RIGHT = 690
BOTTOM = 280
BAR_HEIGHT = 18

# The background changes with the text, so that the chart is readable on any page.
STYLE = """
.background { fill: #ffffff } text { fill: #1f2328 } .axis { stroke: #59636e }
.grid { stroke: #d1d9e0 } .spread-out { fill: #0969da } .hot-user { fill: #bc4c00 }
@media (prefers-color-scheme: dark) {
  .background { fill: #0d1117 } text { fill: #f0f6fc } .axis { stroke: #9198a1 }
  .grid { stroke: #3d444d } .spread-out { fill: #4493f8 } .hot-user { fill: #db6d28 }
}
"""

Figures = Mapping[tuple[str, str], float]  # debits/s by peer and profile


def draw_chart(figures: Figures) -> str:
    """Return the chart as SVG text."""
    step = grid_step(max(figures.values()))
    highest = step * (max(figures.values()) // step + 1)
    scale = (RIGHT - LEFT) / highest
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            'aria-labelledby="title description" font-family="sans-serif" font-size="13">',
            f'<title id="title">{TITLE}</title>',
            f'<desc id="description">{escape(describe(figures))}</desc>',
            f"<style>{STYLE}</style>",
            f'<rect class="background" width="{WIDTH}" height="{HEIGHT}"/>',
            _text(LEFT, 26, "start", TITLE, "font-size='16' font-weight='bold'"),
            *_legend(),
            *_grid(scale, step, int(highest)),
            *_bars(figures, scale),
            f'<path class="axis" d="M{LEFT},{TOP}V{BOTTOM}H{RIGHT}" fill="none"/>',
            _text((LEFT + RIGHT) / 2, BOTTOM + 40, "middle", "debits/s"),
            "</svg>\n",
        ]
    )


def grid_step(highest: float) -> int:
    """Return 1, 2 or 5 times a power of ten, so that the axis has three to seven steps."""
    power = 1
    while True:
        for step in (power, 2 * power, 5 * power):
            if highest <= 7 * step:
                return step
        power *= 10


def describe(figures: Figures) -> str:
    """Return the figures as a sentence for screen readers."""
    return "; ".join(
        f"{LABELS[peer]}, {profile}: {value:,.0f}" for (peer, profile), value in figures.items()
    )


def read_figures(file: Path) -> Figures:
    """Read debits/s from a file that `make bench ARGS="--json FILE"` wrote.

    Raises:
        KeyError: a result is missing.
    """
    results = {
        (result["peer"], result["profile"]): result["per_second"]
        for result in json.loads(file.read_text())["results"]
        if result["connections"] == CONNECTIONS
    }
    return {(peer, profile): results[peer, profile] for peer in LABELS for profile in PROFILES}


def _legend() -> list[str]:
    marks = []
    for number, (profile, style) in enumerate(PROFILES.items()):
        x = LEFT + 160 * number
        marks.append(f'<rect class="{style}" x="{x}" y="42" width="12" height="12"/>')
        marks.append(_text(x + 18, 53, "start", profile))
    return marks


def _grid(scale: float, step: int, highest: int) -> list[str]:
    marks = []
    for value in range(0, highest + 1, step):
        x = LEFT + value * scale
        marks.append(f'<path class="grid" d="M{x:.1f},{TOP}V{BOTTOM}"/>')
        marks.append(_text(x, BOTTOM + 18, "middle", f"{value:,}"))
    return marks


def _bars(figures: Figures, scale: float) -> list[str]:
    marks = []
    for row, (peer, label) in enumerate(LABELS.items()):
        middle = TOP + (BOTTOM - TOP) * (row + 0.5) / len(LABELS)
        marks.append(_text(LEFT - 10, middle + 4, "end", label))
        for number, (profile, style) in enumerate(PROFILES.items()):
            value = figures[peer, profile]
            y = middle + BAR_HEIGHT * (number - 1)
            marks.append(
                f'<rect class="{style}" x="{LEFT}" y="{y:.1f}" width="{value * scale:.1f}" '
                f'height="{BAR_HEIGHT - 2}"/>'
            )
            marks.append(_text(LEFT + value * scale + 6, y + 13, "start", f"{value:,.0f}"))
    return marks


def _text(x: float, y: float, anchor: str, text: str, attributes: str = "") -> str:
    attributes = f" {attributes}" if attributes else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{attributes}>{escape(text)}</text>'


def main() -> None:
    """Write the chart to the file that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bench.chart", description=__doc__)
    parser.add_argument("results", type=Path, help='file that make bench ARGS="--json FILE" wrote')
    parser.add_argument("picture", type=Path, help="file for the chart, such as chart.svg")
    arguments = parser.parse_args()
    try:
        figures = read_figures(arguments.results)
    except OSError as error:
        parser.error(f"{arguments.results} cannot be read: {error.strerror}")
    except (ValueError, KeyError, TypeError):
        parser.error(
            f"{arguments.results} does not have the results of the service and its peers; "
            'make bench ARGS="--json FILE" without --against writes them'
        )
    arguments.picture.write_text(draw_chart(figures))


if __name__ == "__main__":
    main()
