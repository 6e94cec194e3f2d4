"""Draw the panels of a Grafana dashboard with their data as SVG."""

from dataclasses import dataclass
from math import floor, isnan, log10
from typing import Any
from xml.sax.saxutils import escape

WIDTH = 1200
UNIT_WIDTH = WIDTH / 24  # Grafana's grid has 24 columns
UNIT_HEIGHT = 22
ROWS = 61
HEIGHT = ROWS * UNIT_HEIGHT
GAP = 4
LEFT = 62  # room for the labels of an axis
TOP = 30
TICKS = 3
LEGENDS_MAX = 3  # lines below a chart
LINE_HEIGHT = 12
COLOURS = (
    "#73bf69",
    "#f2cc0c",
    "#5794f2",
    "#ff780a",
    "#f2495c",
    "#b877d9",
    "#37872d",
    "#8ab8ff",
    "#ffa6b0",
    "#e0b400",
)
STYLE = """
text { font-family: sans-serif; font-size: 10px; fill: #9fa7b3 }
.title { font-size: 12px; font-weight: bold; fill: #d8d9da } .row { font-size: 14px; fill: #d8d9da }
.value { font-size: 30px } .panel { fill: #181b1f; stroke: #2c3235 } .grid { stroke: #2c3235 }
polyline { fill: none; stroke-width: 1.5 }
"""


@dataclass(frozen=True)
class Series:
    """A legend, and values by their seconds since the start of the picture."""

    legend: str
    values: list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """A panel as dashboard.json defines it, and the results of its queries."""

    definition: dict[str, Any]
    series: list[Series]


@dataclass(frozen=True)
class Box:
    """The place of a panel or chart in the picture, in pixels."""

    x: float
    y: float
    width: float
    height: float


def draw_dashboard(panels: list[Panel]) -> str:
    """Return the dashboard as SVG text."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}">',
            f'<style>{STYLE}</style><rect width="{WIDTH}" height="{HEIGHT}" fill="#111217"/>',
            *(_draw(panel) for panel in panels),
            "</svg>",
        ]
    )


def format_value(value: float, unit: str) -> str:
    """Return a value as Grafana shows it."""
    match unit:
        case "s":
            return f"{value:.1f} s" if value >= 1 else f"{value * 1000:.3g} ms"
        case "percentunit":
            return f"{value:.1%}"
        case "bytes":
            return f"{value / 2**20:.0f} MiB"
        case "reqps":
            return f"{value:.3g} req/s"
        case "currencySEK":
            return f"{value:.0f} kr"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _draw(panel: Panel) -> str:
    place = panel.definition["gridPos"]
    box = Box(
        place["x"] * UNIT_WIDTH + GAP / 2,
        place["y"] * UNIT_HEIGHT + GAP / 2,
        place["w"] * UNIT_WIDTH - GAP,
        place["h"] * UNIT_HEIGHT - GAP,
    )
    title = escape(panel.definition["title"])
    kind = panel.definition["type"]
    if kind == "row":
        return f'<text class="row" x="{box.x + 6}" y="{box.y + 15}">{title}</text>'
    marks = [
        f'<rect class="panel" x="{box.x}" y="{box.y}" width="{box.width}" height="{box.height}"/>',
        f'<text class="title" x="{box.x + 8}" y="{box.y + 17}">{title}</text>',
    ]
    drawn = _draw_lines(panel, box) if kind == "timeseries" else _draw_values(panel, box)
    return "".join([*marks, *drawn])


def _draw_values(panel: Panel, box: Box) -> list[str]:
    unit = panel.definition["fieldConfig"]["defaults"].get("unit", "none")
    step = (box.height - TOP) / max(len(panel.series), 1)
    is_table = panel.definition["type"] == "table"
    marks = []
    for number, series in enumerate(panel.series):
        middle = box.x + box.width / 2
        y = box.y + TOP + step * (number + 0.5)
        value = format_value(series.values[-1][1], unit)
        text = f"{series.legend}: {value}" if is_table else value
        style = "class='row'" if is_table else f"class='value' style='fill:{COLOURS[0]}'"
        marks.append(f'<text {style} x="{middle}" y="{y}" text-anchor="middle">{text}</text>')
        if not is_table:
            marks.append(
                f'<text x="{middle}" y="{y + 16}" text-anchor="middle">{series.legend}</text>'
            )
    return marks


def _draw_lines(panel: Panel, box: Box) -> list[str]:
    defaults = panel.definition["fieldConfig"]["defaults"]
    legend, lines = _draw_legend(panel.series, box)
    chart = Box(
        box.x + LEFT,
        box.y + TOP,
        box.width - LEFT - 10,
        box.height - TOP - 22 - lines * LINE_HEIGHT,
    )
    layers = _stack(panel.series) if _is_stacked(defaults) else panel.series
    values = [value for series in layers for _, value in series.values if not isnan(value)]
    seconds = max((at for series in layers for at, _ in series.values), default=1)
    unit = defaults.get("unit", "none")
    least = 0.01 if unit == "percentunit" else 1
    highest = TICKS * _step(max(values, default=0) / TICKS or least)
    marks = _draw_axes(chart, highest, seconds, unit)
    for number, series in reversed(list(enumerate(layers))):
        points = [
            f"{chart.x + at / seconds * chart.width:.1f},"
            f"{chart.y + chart.height * (1 - value / highest):.1f}"
            for at, value in series.values
            if not isnan(value)
        ]
        colour = COLOURS[number % len(COLOURS)]
        marks.append(f'<polyline points="{" ".join(points)}" stroke="{colour}"/>')
    return marks + legend


def _step(value: float) -> float:
    """Return the next of 1, 2, 2.5 or 5 times a power of ten."""
    power: float = 10 ** floor(log10(value))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if value <= power * factor)


def _is_stacked(defaults: dict[str, Any]) -> bool:
    mode: str = defaults.get("custom", {}).get("stacking", {}).get("mode", "none")
    return mode == "normal"


def _stack(series: list[Series]) -> list[Series]:
    sums: dict[float, float] = {}
    stacked = []
    for one in series:
        for at, value in one.values:
            sums[at] = sums.get(at, 0) + value
        stacked.append(Series(one.legend, [(at, sums[at]) for at, _ in one.values]))
    return stacked


def _draw_axes(chart: Box, highest: float, seconds: float, unit: str) -> list[str]:
    marks = []
    for tick in range(TICKS + 1):
        y = chart.y + chart.height * (1 - tick / TICKS)
        label = format_value(highest * tick / TICKS, unit)
        marks.append(f'<path class="grid" d="M{chart.x},{y:.1f}h{chart.width}"/>')
        marks.append(f'<text x="{chart.x - 5}" y="{y + 3:.1f}" text-anchor="end">{label}</text>')
    for tick in range(TICKS + 1):
        x = chart.x + chart.width * tick / TICKS
        y = chart.y + chart.height + 13
        label = f"{seconds * tick / TICKS:.0f} s"
        marks.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{label}</text>')
    return marks


def _draw_legend(series: list[Series], box: Box) -> tuple[list[str], int]:
    """Return the legend at the bottom of a panel, and its number of lines."""
    lines: list[list[tuple[int, str]]] = [[]]
    x = 0.0
    for number, one in enumerate(series):
        width = 24 + 5.6 * len(one.legend)
        if x and x + width > box.width - 16:
            lines.append([])
            x = 0
        lines[-1].append((number, one.legend))
        x += width
    lines = lines[:LEGENDS_MAX]
    marks = []
    for row, line in enumerate(lines):
        y = box.y + box.height - 6 - LINE_HEIGHT * (len(lines) - 1 - row)
        x = box.x + 8
        for number, legend in line:
            colour = COLOURS[number % len(COLOURS)]
            marks.append(f'<rect x="{x}" y="{y - 5}" width="10" height="3" fill="{colour}"/>')
            marks.append(f'<text x="{x + 14}" y="{y}">{escape(legend)}</text>')
            x += 24 + 5.6 * len(legend)
    return marks, len(lines)
