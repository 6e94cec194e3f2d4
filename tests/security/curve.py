"""Draw memory over time as an SVG chart."""

from collections.abc import Sequence
from xml.sax.saxutils import escape

WIDTH = 720
HEIGHT = 300
LEFT = 60
TOP = 40
RIGHT = 700
BOTTOM = 260
LIMIT_MEBIBYTES = 256  # of a pod


def draw_curve(title: str, samples: Sequence[tuple[float, float]]) -> str:
    """Return a chart of mebibytes by seconds as SVG text, with a line at a pod's limit."""
    seconds_max = max(second for second, _ in samples) or 1

    def x(second: float) -> float:
        return LEFT + (RIGHT - LEFT) * second / seconds_max

    def y(mebibytes: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * mebibytes / (LIMIT_MEBIBYTES * 1.1)

    points = " ".join(f"{x(second):.1f},{y(mebibytes):.1f}" for second, mebibytes in samples)
    marks: list[tuple[float, float, str, str]] = [
        (LEFT - 8, y(value) + 4, "end", f"{value} MiB") for value in range(0, 257, 64)
    ]
    minutes = range(0, int(seconds_max // 60) + 1, max(1, int(seconds_max // 600)))
    marks += [(x(60 * value), BOTTOM + 18, "middle", f"{value} min") for value in minutes]
    marks += [(LEFT, TOP - 18, "start", title)]
    limit = f'x1="{LEFT}" x2="{RIGHT}" y1="{y(LIMIT_MEBIBYTES):.1f}" y2="{y(LIMIT_MEBIBYTES):.1f}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            f'<path d="M{LEFT},{TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="black"/>',
            f'<line {limit} stroke="firebrick" stroke-dasharray="6 4"/>',
            f'<polyline points="{points}" fill="none" stroke="steelblue" stroke-width="1.5"/>',
            *(
                f'<text x="{at:.0f}" y="{height:.0f}" text-anchor="{anchor}">{escape(text)}</text>'
                for at, height, anchor, text in marks
            ),
            "</svg>\n",
        ]
    )
