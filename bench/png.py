"""Reduce the size of a PNG picture of charts: a palette of 256 colours instead of true colours."""

import struct
import zlib
from collections import Counter
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = {2: 3, 6: 4}  # by the colour type: RGB, RGBA
PALETTE = 3
COLOURS_MAX = 256


def with_palette(png: bytes) -> bytes:
    """Return the picture with its most frequent colours, and the nearest of them for all others.

    Raises:
        ValueError: the picture is not of 8-bit RGB or RGBA colours without interlacing.
    """
    header = next(data for kind, data in _chunks(png) if kind == b"IHDR")
    width, height, depth, colour_type, *rest = struct.unpack(">IIBBBBB", header)
    if depth != 8 or colour_type not in CHANNELS or any(rest):
        raise ValueError("the picture should have 8-bit RGB or RGBA colours without interlacing")
    channels = CHANNELS[colour_type]
    data = zlib.decompress(b"".join(data for kind, data in _chunks(png) if kind == b"IDAT"))
    rows = list(_unfilter(data, width * channels, channels))
    pixels = [
        [row[at : at + 3] for at in range(0, width * channels, channels)]
        for row in map(bytes, rows)
    ]
    counts = Counter(pixel for row in pixels for pixel in row)
    palette = [colour for colour, _ in counts.most_common(COLOURS_MAX)]
    places = {colour: _nearest(colour, palette) for colour in counts}
    indexed = b"".join(b"\0" + bytes(places[pixel] for pixel in row) for row in pixels)
    return SIGNATURE + b"".join(
        [
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, PALETTE, 0, 0, 0)),
            _chunk(b"PLTE", b"".join(palette)),
            _chunk(b"IDAT", zlib.compress(indexed, 9)),
            _chunk(b"IEND", b""),
        ]
    )


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = len(SIGNATURE)
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        yield kind, png[at + 8 : at + 8 + length]
        at += length + 12


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _unfilter(data: bytes, length: int, channels: int) -> Iterator[bytearray]:
    """Yield the rows without the filters of PNG (RFC 2083, section 6)."""
    above = bytearray(length)
    for start in range(0, len(data), length + 1):
        kind = data[start]
        row = bytearray(data[start + 1 : start + 1 + length])
        for at in range(length):
            left = row[at - channels] if at >= channels else 0
            up = above[at]
            corner = above[at - channels] if at >= channels else 0
            added = (0, left, up, (left + up) // 2, _paeth(left, up, corner))[kind]
            row[at] = (row[at] + added) & 255
        yield row
        above = row


def _paeth(left: int, up: int, corner: int) -> int:
    estimate = left + up - corner
    return min((left, up, corner), key=lambda value: abs(estimate - value))


def _nearest(colour: bytes, palette: list[bytes]) -> int:
    def distance(place: int) -> int:
        return sum((a - b) ** 2 for a, b in zip(colour, palette[place], strict=True))

    return min(range(len(palette)), key=distance)
