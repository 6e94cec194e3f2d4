"""The picture of the dashboard shows every panel of dashboard.json, and is small."""

import json
import struct
import zlib
from pathlib import Path
from xml.etree import ElementTree

from bench.dashboard import DASHBOARD
from bench.panels import Panel, Series, draw_dashboard, format_value
from bench.png import SIGNATURE, with_palette

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "dashboard.png"
RED, BLUE = b"\xff\0\0", b"\0\0\xff"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_the_picture_has_every_panel_and_every_legend() -> None:
    definitions = json.loads(DASHBOARD.read_text())["panels"]
    series = [Series("first", [(0, 1), (60, 2)]), Series("second", [(0, float("nan")), (60, 0)])]
    panels = [Panel(definition, series) for definition in definitions]
    picture = ElementTree.fromstring(draw_dashboard(panels))  # noqa: S314 - not from outside
    texts = [element.text for element in picture.iter()]
    for definition in definitions:
        assert definition["title"] in texts
    assert texts.count("first") >= sum(one["type"] == "timeseries" for one in definitions)


def test_values_have_the_units_of_the_panel() -> None:
    assert format_value(0.25, "s") == "250 ms"
    assert format_value(0.001, "percentunit") == "0.1%"
    assert format_value(90 * 2**20, "bytes") == "90 MiB"


def test_a_picture_with_a_palette_has_the_same_pixels() -> None:
    header = struct.pack(">IIBBBBB", 2, 2, 8, 2, 0, 0, 0)
    # The second row has the filter "up", so its bytes are differences from the first row.
    rows = b"\0" + RED + BLUE + b"\2" + bytes(6)
    png = SIGNATURE + b"".join(
        [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    )
    smaller = with_palette(png)
    assert chunk(b"PLTE", RED + BLUE) in smaller
    assert chunk(b"IDAT", zlib.compress(b"\0\0\1\0\0\1", 9)) in smaller


def test_the_picture_in_the_documentation_is_below_150_kb() -> None:
    assert PICTURE.read_bytes().startswith(SIGNATURE)
    assert PICTURE.stat().st_size < 150_000
