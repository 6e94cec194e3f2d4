"""The log: JSON for machines, readable at a terminal; every line says of which request it is."""

import asyncio
import logging
import sys
from datetime import UTC, datetime
from typing import Any, BinaryIO, cast

import orjson
import structlog
from structlog.stdlib import ProcessorFormatter
from structlog.types import EventDict, Processor

from app.telemetry.request_record import request_now


def configure_logging(level: str) -> None:
    """Send to standard error what the service logs itself, and what its libraries do."""
    stamp: list[Processor] = [_stamp]
    render: list[Processor] = [structlog.processors.format_exc_info, _as_json]
    if sys.stderr.isatty():
        stamp = [structlog.processors.add_log_level, structlog.processors.TimeStamper("%H:%M:%S")]
        # Its own choice would show the variables of each function, and tokens and keys among them.
        plain = structlog.dev.plain_traceback
        render = [structlog.dev.ConsoleRenderer(exception_formatter=plain)]
    # Lines of requests are many, and go past the standard library, which doubles their cost.
    structlog.configure(
        processors=[*stamp, render[-1], cast("Processor", _as_bytes)],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level]),
        logger_factory=lambda *_: _LineWriter(sys.stderr.buffer),
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        ProcessorFormatter(
            foreign_pre_chain=[*stamp, structlog.stdlib.add_logger_name, _add_request],
            processors=[
                ProcessorFormatter.remove_processors_meta,
                *render,
                cast("Processor", _as_text),
            ],
        )
    )
    root = logging.getLogger()
    for previous in list(root.handlers):
        if isinstance(previous.formatter, ProcessorFormatter):
            root.removeHandler(previous)
    root.addHandler(handler)
    root.setLevel(level)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line per call says nothing new
    logging.getLogger("uvicorn.asgi").setLevel(logging.INFO)  # its trace shows requests' headers
    # It warns of an OTEL_EXPORTER_OTLP_HEADERS that it cannot read by repeating it.
    logging.getLogger("opentelemetry.util.re").setLevel(logging.ERROR)
    _take_over_from_server()


class _LineWriter:
    """Writes the lines of one turn of the event loop together: alone, each would cost a call."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._lines: list[bytes] = []

    def info(self, line: bytes) -> None:
        if not self._lines:
            asyncio.get_running_loop().call_soon(self._flush)
        self._lines.append(line)

    warning = info

    def _flush(self) -> None:
        lines, self._lines = self._lines, []
        self._stream.write(b"\n".join([*lines, b""]))
        self._stream.flush()


def _take_over_from_server() -> None:
    """Give uvicorn's lines the shape of all others; a request has its line already."""
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"
    # Started otherwise than by `python -m app`, it logs the query of a WebSocket handshake.
    logging.getLogger("uvicorn.error").addFilter(_is_no_handshake)


def _is_no_handshake(record: logging.LogRecord) -> bool:
    return '"WebSocket ' not in str(record.msg)


def _stamp(_logger: Any, method: str, event: EventDict) -> EventDict:
    event["level"] = method
    event["timestamp"] = datetime.now(UTC)
    return event


def _add_request(_logger: Any, _method: str, event: EventDict) -> EventDict:
    if record := request_now.get():
        event["request_id"] = record.request_id
        event["trace_id"] = record.trace_id
    return event


def _as_json(_logger: Any, _method: str, event: EventDict) -> bytes:
    return orjson.dumps(event, default=repr, option=orjson.OPT_UTC_Z)


def _as_bytes(_logger: Any, _method: str, line: str | bytes) -> bytes:
    return line.encode() if isinstance(line, str) else line


def _as_text(_logger: Any, _method: str, line: str | bytes) -> str:
    return line.decode() if isinstance(line, bytes) else line
