"""Almost valid HTTP: requests that are mutated randomly from a seed."""

import json
import random
from collections.abc import Callable

ITEM = "550e8400-e29b-41d4-a716-446655440000"
BODY = json.dumps({"user_id": 1, "item_id": ITEM}).encode()
POST = b"POST /payments/debit HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"5\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (BODY[:5], len(BODY) - 5, BODY[5:])
SEEDS = (
    POST + b"Content-Length: %d\r\n\r\n%b" % (len(BODY), BODY),
    POST + CHUNKED + b"\r\n" + CHUNKS,
    POST + CHUNKED + b"Trailer: X-Sum\r\n\r\n" + CHUNKS[:-2] + b"X-Sum: 1\r\n\r\n",
    POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY),
    b"GET /payments/outcome?user_id=1&idempotency_key=a%2Fb HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    b"GET /problems HTTP/1.0\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    b"HEAD /health HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET http://x/nowhere HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\n\r\n",
)
HEADERS = (
    b"Content-Length: 0",
    b"Content-Length: -1",
    b"Content-Length: +5",
    b"Content-Length: 5, 5",
    b"Content-Length: 99999999999999999999",
    b"Content-Length: 9223372036854775807",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: chunked, identity",
    b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: \x0bchunked",
    b"Transfer-Encoding : chunked",
    b"Connection: close",
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c",
    b"Upgrade: websocket\r\nConnection: Upgrade",
    b"Expect: 100-continue",
    b"Expect: nonsense",
    b"Host: y",
    b"X-Request-ID: \xff\xfe",
    b"X-Folded: a\r\n b",
    b": empty",
    b"NoColon",
    b"X-Null: \0",
    b"Content-Type: application/json; charset=utf-16",
    b"Content-Encoding: gzip",
    b'Idempotency-Key: "',
    b"Origin: null",
    b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
)
SPLICES = (
    b"\0",
    b"\r",
    b"\n",
    b"\r\n",
    b"\r\n\r\n",
    b" ",
    b"\t",
    b"\xff\xfe",
    b"\xc3\x28",
    b";",
    b":",
    b"0\r\n\r\n",
    b"ffffffffffffffff\r\n",
    b"7fffffffffffffff\r\n",
    b"-1\r\n",
    b"5;a=b\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00",
    b"CONNECT x:1 HTTP/1.1\r\n\r\n",
    b"%00",
    b"%",
    b"%zz",
    b"/../",
    b"?",
    b"#",
    b"HTTP/1.1",
    b"HTTP/9.9",
    b"x" * 5000,
    b"a:b\r\n" * 150,
)

Change = Callable[[random.Random, bytes], bytes]


def _truncate(draw: random.Random, sent: bytes) -> bytes:
    return sent[: draw.randrange(len(sent) + 1)]


def _flip(draw: random.Random, sent: bytes) -> bytes:
    changed = bytearray(sent)
    for _ in range(draw.randint(1, 4)):
        if changed:
            changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def _splice(draw: random.Random, sent: bytes) -> bytes:
    at = draw.randrange(len(sent) + 1)
    return sent[:at] + draw.choice(SPLICES) + sent[at:]


def _cut_out(draw: random.Random, sent: bytes) -> bytes:
    at = draw.randrange(len(sent) + 1)
    return sent[:at] + sent[at + draw.randint(1, 20) :]


def _repeat_line(draw: random.Random, sent: bytes) -> bytes:
    lines = sent.split(b"\r\n")
    at = draw.randrange(len(lines))
    return b"\r\n".join([*lines[:at], *[lines[at]] * draw.randint(2, 5), *lines[at + 1 :]])


def _add_header(draw: random.Random, sent: bytes) -> bytes:
    start, found, rest = sent.partition(b"\r\n")
    return start + found + draw.choice(HEADERS) + b"\r\n" + rest


def _change_line_ends(draw: random.Random, sent: bytes) -> bytes:
    return sent.replace(b"\r\n", draw.choice((b"\n", b"\r", b"\r\r\n")), draw.randint(1, 9))


CHANGES: tuple[Change, ...] = (
    _truncate,
    _flip,
    _splice,
    _cut_out,
    _repeat_line,
    _add_header,
    _add_header,
    _add_header,
    _change_line_ends,
)


def make_pieces(draw: random.Random) -> list[bytes]:
    """Draw the pieces that a connection sends: 1 to 12 requests, mostly mutated."""
    sent = b""
    for _ in range(draw.choice((1, 1, 1, 2, 3, 12))):
        request = draw.choice(SEEDS)
        for _ in range(draw.choice((0, 1, 1, 2, 4))):
            request = draw.choice(CHANGES)(draw, request)
        sent += request
    cuts = sorted(draw.randrange(len(sent) + 1) for _ in range(draw.choice((0, 0, 1, 3))))
    return [sent[start:end] for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True)]
